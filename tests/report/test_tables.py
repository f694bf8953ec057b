"""Tables and summaries from given scores: every number with n and interval, keys as promised."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pathokd.cost.profile import ModelCost
from pathokd.evaluate import Fidelity, ModelScores, ProbeResult, RetrievalScore
from pathokd.report import (
    comparison_markdown,
    comparison_summary,
    comparison_table,
    fidelity_sentence,
    write_summary,
)


def scores(name: str, accuracy: float, across: bool = True) -> ModelScores:
    retrieval = RetrievalScore(0.91, (0.88, 0.93), 10, 500, 3, 120, 10 / 999, 0.8, 0.4, 0.0)
    return ModelScores(
        name=name,
        readout="cls",
        cost=ModelCost(5_500_000, 2.5, 41.26),
        probe=ProbeResult(accuracy, (accuracy - 0.02, accuracy + 0.02), 1234, 0.7, (0.68, 0.72), 99, 6),
        cross_scanner=retrieval if across else None,
        cross_staining=None,
    )


@pytest.fixture
def comparison() -> dict[str, ModelScores]:
    return {"teacher": scores("teacher", 0.9), "student": scores("student", 0.88)}


def test_terminal_table(comparison: dict[str, ModelScores]) -> None:
    out = io.StringIO()
    Console(file=out, width=140).print(comparison_table(comparison, "Teacher and student"))
    text = out.getvalue()
    for part in (
        "5.50 M",
        "41.3",
        "0.880 (0.860 to 0.900)",
        "0.910 (0.880 to 0.930)",
        "top-10 across scanners",
    ):
        assert part in text
    assert "stainings" not in text
    assert "6 classes on 1,234 held-out tiles of 99 groups" in " ".join(text.split())
    assert "3 pairs of 500 tiles each, chance 0.010" in " ".join(text.split())


def test_intervals_of_too_few_groups_say_so(comparison: dict[str, ModelScores]) -> None:
    for n_groups, told in ((99, False), (4, True)):
        some = {
            name: model._replace(probe=model.probe._replace(n_groups=n_groups)) for name, model in comparison.items()
        }
        out = io.StringIO()
        Console(file=out, width=140).print(comparison_table(some))
        assert ("resampling groups, which are too few for them;" in " ".join(out.getvalue().split())) is told


def test_models_for_which_a_terminal_is_too_narrow_follow_below() -> None:
    """Thirteen models in 80 columns were a table of "0.…"."""
    many = {f"model_{i}": scores(f"model_{i}", 0.6 + i / 100) for i in range(13)}
    out = io.StringIO()
    Console(file=out, width=80).print(comparison_table(many, "Thirteen"))
    text = out.getvalue()
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80
    for i in range(13):
        assert f"model_{i} " in text
        assert f"{0.6 + i / 100:.3f} " in text
        assert f"({0.58 + i / 100:.3f} to {0.62 + i / 100:.3f})" in text
    assert text.count("Thirteen") == text.count("held-out tiles") == 1
    assert text.count("parameters") == 5  # three fit side by side
    two = io.StringIO()
    Console(file=two, width=140).print(comparison_table({name: many[name] for name in ("model_0", "model_1")}))
    assert two.getvalue().count("parameters") == 1
    Console(file=out, width=10).print(comparison_table(many))  # narrower than one model: rich cuts, nothing loops


def test_markdown_is_a_table(comparison: dict[str, ModelScores]) -> None:
    lines = comparison_markdown(comparison).splitlines()
    assert lines[0] == "| | teacher | student |"
    assert lines[1] == "|---|--:|--:|"
    rows = lines[2 : lines.index("")]
    assert len(rows) == 7
    assert all(line.count("|") == 4 for line in rows)
    assert comparison_markdown({}).startswith("| |")


def test_names_are_shown_as_they_are() -> None:
    """Brackets are markup to rich, and a bar is a column to Markdown."""
    odd = {"vits[half]": scores("vits[half]", 0.9), "a|b": scores("a|b", 0.8)}
    out = io.StringIO()
    Console(file=out, width=140).print(comparison_table(odd, "of [bold]"))
    for name in ("vits[half]", "a|b", "of [bold]"):
        assert name in out.getvalue()
    head, rule = comparison_markdown(odd).splitlines()[:2]
    assert head == r"| | vits[half] | a\|b |"
    assert rule.count("|") == 4


def test_a_model_without_pairs_has_a_dash(comparison: dict[str, ModelScores]) -> None:
    comparison["control"] = scores("control", 0.4, across=False)
    assert "| top-10 across scanners | 0.910 (0.880 to 0.930) | 0.910 (0.880 to 0.930) | - |" in (
        comparison_markdown(comparison)
    )


def test_summary_has_the_promised_keys(comparison: dict[str, ModelScores], tmp_path: Path) -> None:
    fidelity = Fidelity(0.91, None, 0.85, 0.6, 512)
    written = write_summary(tmp_path / "summary.json", comparison, fidelity, {"seconds": 12.5})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == written
    assert set(found) == {"teacher", "student", "fidelity", "seconds"}
    wanted = {"params", "gflops", "tiles_per_s", "probe_accuracy", "probe_ci", "top10_cross_scanner"}
    assert wanted <= set(found["student"])
    assert found["student"]["probe_accuracy"] == 0.88
    assert found["student"]["probe_ci"] == [0.86, 0.9]
    assert found["student"]["top10_cross_staining"] is None
    assert found["fidelity"] == {
        "cosine_cls": 0.91,
        "cosine_patches": None,
        "cka": 0.85,
        "knn_overlap": 0.6,
        "n": 512,
    }
    assert "fidelity" not in comparison_summary(comparison)
    student = comparison["student"]
    unknown = student._replace(probe=student.probe._replace(ci=(float("nan"), float("nan"))))  # of one group
    assert write_summary(tmp_path / "one.json", {"student": unknown})["student"]["probe_ci"] == [None, None]


def test_fidelity_is_one_sentence() -> None:
    assert fidelity_sentence(Fidelity(0.91, 0.8, 0.85, 0.6, 1512)) == (
        "Student to teacher on 1,512 tiles: cosine CLS 0.910, cosine patches 0.800, linear CKA 0.850, "
        "10-NN overlap 0.600."
    )
    assert "patches" not in fidelity_sentence(Fidelity(0.91, None, 0.85, 0.6, 12))
