"""A wrong argument or recipe is answered by one sentence that names it, without the page of options."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from pathokd.cli import compare
from pathokd.cli.main import main, plain_warnings
from pathokd.cli.wording import sentence

RECIPE = Path(__file__).parents[2] / "configs/distill/quickstart.yaml"


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code: Any = main(args)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            {"data": {"registered": {"case": "case", "conditions": ["stain", "scanner"], "reference": ["a"]}}},
            1,
            "reference must have one value for each of the conditions stain, scanner, got a.",
        ),
        (
            {"model": {"objectives": [{"loss": "pathokd.losses.CosineSmoothL1", "tokens": "clss"}]}},
            2,
            "model.objectives.tokens: expected one of 'cls', 'patches', got clss;",
        ),
        (
            {"model": {"objectives": [{"loss": "pathokd.losses.CosineSmothL1"}]}},
            2,
            "model.objectives.loss: module 'pathokd.losses' has no attribute 'CosineSmothL1';",
        ),
        ({"model": {"teachers": {"a": {"weights": "x", "precison": "bf16"}}}}, 2, "'precison' is not an option;"),
        (
            {"data": {"photometric": {"student": [{"class_path": "StudentView", "init_args": {"strength": 7.0}}]}}},
            1,
            "strength must lie within 0 to 1, got 7.0.",
        ),
    ],
)
def test_a_faulty_recipe(
    change: dict[str, Any], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(change), encoding="utf-8")
    words = ["fit", "--config", str(RECIPE), "--config", str(tmp_path / "wrong.yaml"), "--out", str(tmp_path / "run")]
    got, text = refused(words, capsys)
    assert got == code
    assert text.startswith("pathokd fit: ")
    assert said in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["tile", "x", "--out", "y", "--tile-px", "a"],
            "pathokd tile: --tile-px: expected int, got a; pathokd tile",
        ),
        (["tile", "x", "--out", "y", "--tile-pix", "7"], "--tile-pix 7 (did you mean --tile-px?)"),
        (["tile", "x", "--out", "y", "--border", "out"], "--border: expected one of 'inside', 'cover', got out;"),
        (["tile"], "required: --out, slides;"),
        (["fit", "--config", str(RECIPE), "--trainer.maxsteps", "2"], "(did you mean --trainer.max_steps"),
        (["fit", "--config", str(RECIPE), "--trainer.max_steps", "x"], "--trainer.max_steps: expected int, got x;"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_argument(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused(args, capsys)
    assert code == 2
    assert said in text
    assert len(text.strip().splitlines()) == 1


def test_other_text_stays_as_it_is() -> None:
    ours = "Two things are wrong:\n- the slide\n- the stain"
    assert sentence(f" {ours}\n") == ours


def test_help_begins_with_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "usage: pathokd fit --config RECIPE.yaml [--config MORE.yaml ...] [--KEY VALUE ...]"
    assert "--model.ema_momentum" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tile", "slides"], "the following arguments are required: --out;"),
        (["embed", "model"], "the following arguments are required: --out, slides;"),
        (["export", "x", "--out", "y", "--layout", "clamm"], "'anndata', 'parquet', got clamm;"),
    ],
)
def test_a_wrong_command_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing --out was called "out", and of an option that may be left out the value was not said."""
    code, text = refused(words, capsys)
    assert (code, len(text.strip().splitlines())) == (2, 1)
    assert said in text
    assert "typing" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tile", "{tmp}", "--out", ""], "--out is empty, as an unset variable of the shell is: give it a value."),
        (["tile", "", "--out", "{tmp}/out"], "slides is empty"),
        (["pack", "", "--out", "{tmp}/out"], "tiles is empty"),
        (["embed", "{tmp}", "{tmp}", "--mpp-level0", "0.5", "--device=", "--out", "{tmp}/out"], "--device is empty"),
    ],
)
def test_an_empty_word_is_not_the_folder_one_stands_in(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--out "$OUT"` and no such variable, tables and folders of tiles went there."""
    monkeypatch.chdir(tmp_path)
    code, text = refused([word.format(tmp=tmp_path) for word in words], capsys)
    assert code == 1
    assert said in text
    assert not list(tmp_path.iterdir())


def test_own_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """They came with the path and the code of the line that warned."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    plain_warnings()
    assert warnings.formatwarning("Look here.", UserWarning, compare.__file__, 3) == "pathokd: Look here.\n"
    for category, file in ((DeprecationWarning, compare.__file__), (UserWarning, pytest.__file__)):
        assert f"{file}:3: {category.__name__}: Look here." in warnings.formatwarning("Look here.", category, file, 3)
