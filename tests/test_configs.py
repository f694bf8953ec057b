"""Every recipe is parsed, and trains two steps end to end with tiny stand-ins for its teacher's weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pathokd.cli.main import main
from pathokd.cli.training_cost import average_lag
from pathokd.distill.schedules import average_age
from pathokd.models import StudentSpec, build_student

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs/distill").glob("*.yaml"))
HEADER = ("Aim:", "Command", "Hardware", "Expected:")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_prints_itself(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(recipe), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert printed["data"]["batch_size"] == written["data"]["batch_size"]
    assert printed["model"]["teachers"].keys() == written["model"]["teachers"].keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for(recipe: Path) -> None:
    comment = "\n".join(line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert all(word in comment for word in HEADER)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_average_of_a_recipe_does_not_lag(recipe: Path) -> None:
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    momentum, steps = written["model"].get("ema_momentum"), written["trainer"]["max_steps"]
    assert steps > 0
    assert momentum is None or not average_lag(momentum, steps)


def test_an_average_that_lags_is_told() -> None:
    said = average_lag((0.95, 1.0), 260)
    assert said.endswith("it ends 42% of these 260 steps behind the last one, by [0.9286, 0.9286] 5%.")
    assert not average_lag((0.9231, 0.9231), 260)


@pytest.mark.parametrize("steps", [3, 40, 260, 12500])
def test_the_momentum_that_is_named_lags_as_it_says(steps: int) -> None:
    momentum = float(average_lag((1.0, 1.0), steps).split("[")[-1].split(",")[0])
    assert average_age(np.full(steps, momentum)) / steps == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps(
    recipe: Path,
    packed: Path,
    registered_packed: Path,
    tiny_teacher: Path,
    tiny_prototypes: Path,
    tmp_path: Path,
) -> None:
    """The recipe's objectives, views and optimiser as they are; teacher and student small enough for a test."""
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    registered = "registered" in written["data"]
    packed = registered_packed if registered else packed
    teachers = written["model"]["teachers"]
    small = {
        "model": {
            "teachers": {
                key: {"weights": str(tiny_teacher), **_targets(spec, packed, tiny_teacher, tmp_path / key)}
                for key, spec in teachers.items()
            },
            "student": {
                "architecture": "vit_tiny_patch16_224",
                "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "reg_tokens": 4},
                "image_px": 32,
            },
            "compile": False,
        },
        "data": {"tiles": str(packed), "geometry": {"size_px": 32}, "val_fraction": 0.3, "split_by": "patient"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2},
    }
    if any("denoise" in spec for spec in teachers.values()):
        directions = tmp_path / "denoise.safetensors"
        assert main(["denoise", str(tiny_teacher), str(registered_packed), "--out", str(directions)]) == 0
        for spec in small["model"]["teachers"].values():
            spec["denoise"] = str(directions)
    for objective in written["model"]["objectives"]:
        if "head" in objective["loss"].get("init_args", {}):
            objective["loss"]["init_args"]["head"] = str(tiny_prototypes)
    written["model"]["teachers"] = {}
    for section, values in small.items():
        written[section].update(values)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    debug = ROOT / "configs/override/debug.yaml"
    args = ["fit", "--config", str(tmp_path / "small.yaml"), "--config", str(debug), "--out", str(tmp_path / "run")]
    assert main(["--debug", *args, *(["--data.batch_size", "4"] if registered else [])]) == 0
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "run/config.yaml").is_file()
    assert main(["--debug", "export", str(tmp_path / "run"), "--out", str(tmp_path / "student")]) == 0
    assert (tmp_path / "student/model.safetensors").is_file()


def _targets(spec: dict[str, Any], packed: Path, tiny_teacher: Path, out: Path) -> dict[str, str]:
    """Targets of the stand-in, where the recipe reads its teacher's."""
    if "targets" not in spec:
        return {}
    assert main(["cache", str(tiny_teacher), str(packed), "--out", str(out), "--tokens", "patches"]) == 0
    return {"targets": str(out)}


def test_a_wrong_key_is_named(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = yaml.safe_load((ROOT / "configs/distill/quickstart.yaml").read_text(encoding="utf-8"))
    written["model"]["optim"]["learning_rate"] = 1.0
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "wrong.yaml"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_second_student_lies_over_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["--config", str(ROOT / "configs/distill/hoptimus0_to_vitb.yaml")]
    layers += ["--config", str(ROOT / "configs/override/also_vits.yaml")]
    with pytest.raises(SystemExit):
        main(["fit", *layers, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["student"]["architecture"] == "vit_base_patch14_reg4_dinov2"
    assert build_student(StudentSpec(**model["more_students"]["vits"])).embed_dim == 384


@pytest.mark.parametrize(
    ("override", "views"),
    [
        (None, ("student", "clean")),
        ("views_same.yaml", ("clean", "clean")),
        ("views_both.yaml", ("student", "student")),
    ],
)
def test_the_arms_of_the_ablation_differ_in_their_views(
    override: str | None, views: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A list in a second config is merged entry by entry: what it leaves out stays as the recipe has it."""
    layers = [] if override is None else ["--config", str(ROOT / "configs/override" / override)]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/distill/quickstart.yaml"), *layers, "--print_config"])
    objectives = yaml.safe_load(capsys.readouterr().out)["model"]["objectives"]
    assert [(o["tokens"], o["view"], o["teacher_view"]) for o in objectives] == [
        ("cls", *views),
        ("patches", *views),
    ]
