"""Tiles per second of `pathokd fit` against a bare loop, timm.task and lightly-train on the same work.

Every contender is a fresh process that notes the end of each step; tiles/s counts the steps after the first `WARM_UP`,
so imports, building models and starting workers are out of it and stand in the column of whole commands. Each round
runs all contenders once, in rotating order; ratios are taken within a round, and their median is the figure.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from pathokd.files import write_json
from pathokd.slides.manifest import TileSpec

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3 * 3600)]

TILES = int(os.environ.get("PATHOKD_BENCH_TILES", "256"))
ROUNDS = int(os.environ.get("PATHOKD_BENCH_ROUNDS", "5"))
BATCH_SIZE = 16
WARM_UP = 2
TEACHER, STUDENT = "vit_small_patch16_224", "vit_tiny_patch16_224"
LABELS = {
    "bare": "bare PyTorch loop, tiles decoded in memory",
    "fit": "`pathokd fit`, packed tiles, same losses",
    "fit_features": "`pathokd fit`, and standardised targets and EMA",
    "fit_bf16": "`pathokd fit`, same losses, its teacher in bf16",
    "fit_mixed": "`pathokd fit`, same losses, its teacher in bf16 and the student in bf16-mixed",
    "fit_two": "`pathokd fit`, same losses, two such students at once",
    "timm": "timm.task.FeatureDistillationTask, tiles decoded in memory",
    "lightly": "lightly-train, distillationv3, tiles as JPEG files",
    "lightly_mixed": "lightly-train, the same in bf16-mixed",
}
AHEAD = 1.15
"""What `fit` with its teacher in bf16 should have over lightly-train in fp32, where the processor computes in bf16."""


@pytest.fixture(scope="module")
def work(bench_slide: Path, cut_tiles: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same tiles packed, decoded and as files; one teacher with random weights in two formats."""
    folder = tmp_path_factory.mktemp("training")
    packed = cut_tiles(bench_slide, folder, TileSpec(), TILES)
    assert len(packed) == TILES, f"the slide has {len(packed)} tiles, set PATHOKD_BENCH_TILES lower"
    (folder / "files").mkdir()
    for row in range(TILES):
        (folder / "files" / f"{row:05d}.jpg").write_bytes(packed.read_encoded(row))
    packed.close()
    torch.manual_seed(1)
    weights = timm.create_model(TEACHER, num_classes=0).state_dict()
    save_file(weights, folder / "teacher.safetensors")
    torch.save(weights, folder / "teacher.pt")
    job = {
        "teacher": str(folder / "teacher.safetensors"),
        "teacher_architecture": TEACHER,
        "student_architecture": STUDENT,
        "tiles": str(folder / "tiles.npy"),
        "batch_size": BATCH_SIZE,
    }
    return {"folder": folder, "job": job}


def fit_config(
    work: dict[str, Any],
    out: Path,
    *,
    features: bool = False,
    teacher: str = "fp32",
    precision: str = "32-true",
    two: bool = False,
) -> dict[str, Any]:
    """What `bare_loop.py` does, as a config; `features` switches on what the bare loop has not."""
    job, extra = work["job"], {} if features else {"standardize_steps": 0, "ema_momentum": None}
    if two:
        extra["more_students"] = {"second": {"architecture": STUDENT, "seed": 1}}
    stopwatch = {"class_path": "fit_stopwatch.FitStopwatch", "init_args": {"out": str(out)}}
    return {
        "model": {
            "teachers": {"vits": {"weights": job["teacher"], "architecture": TEACHER, "precision": teacher}},
            "student": {"architecture": STUDENT},
            "objectives": [
                {"loss": {"class_path": "pathokd.losses.MSE"}, "tokens": "cls"},
                {"loss": {"class_path": "pathokd.losses.Cosine"}, "tokens": "patches"},
            ],
            "optim": {"weight_decay": [0.04, 0.04]},
            **extra,
        },
        "data": {"tiles": str(work["folder"] / "packed"), "batch_size": BATCH_SIZE, "val_fraction": 0.0},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": precision, "callbacks": [stopwatch]},
    }


def run_fit(work: dict[str, Any], run_contender: Any, name: str, attempt: int, **settings: Any) -> dict[str, Any]:
    folder: Path = work["folder"]
    config, out = folder / f"{name}.yaml", folder / f"{name}.out.json"
    write_json(config, fit_config(work, out, **settings))
    cli = [sys.executable, "-c", "from pathokd.cli.main import entry; entry()"]
    return run_contender([*cli, "fit", "--config", str(config), "--out", str(folder / f"{name}-{attempt}")], out)


def run_lightly(work: dict[str, Any], run_contender: Any, binary: Path, precision: str) -> dict[str, Any]:
    folder: Path = work["folder"]
    settings = {
        "out": folder / "lightly",
        "data": folder / "files",
        "model": f"timm/{STUDENT}",
        "model_args.pretrained": "false",
        "model_args.num_classes": 0,
        "method": "distillationv3",
        "method_args.teacher": f"timm/{TEACHER}",
        "method_args.teacher_args.pretrained": "false",
        "method_args.teacher_args.num_classes": 0,
        "method_args.teacher_weights": folder / "teacher.pt",
        "epochs": 1,
        "batch_size": BATCH_SIZE,
        "num_workers": 0,
        "accelerator": "cpu",
        "devices": 1,
        "precision": precision,
        "overwrite": "true",
    }
    stopwatch = Path(__file__).parent / "contenders" / "lightly_stopwatch.py"
    out = folder / "lightly.out.json"
    command = [binary.parent / "python", stopwatch, out, binary, "pretrain"]
    return run_contender([*map(str, command), *(f"{key}={value}" for key, value in settings.items())], out)


def tiles_per_s(facts: dict[str, Any]) -> float:
    """Speed after the warm-up steps, from one step's end to another's."""
    stamps = facts["stamps"][WARM_UP - 1 :]
    return BATCH_SIZE * (len(stamps) - 1) / (stamps[-1] - stamps[0])


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per contender: tiles/s of each round, its ratio to the bare loop of the same round, and both medians."""
    speeds = {name: [tiles_per_s(facts) for facts in rounds] for name, rounds in runs.items()}
    figures = {}
    for name, own in speeds.items():
        to_bare = [a / b for a, b in zip(own, speeds["bare"], strict=True)]
        fit_to_it = [a / b for a, b in zip(speeds["fit"], own, strict=True)]
        figures[name] = {
            "label": LABELS[name],
            "tiles_per_s": own,
            "tiles_per_s_median": median(own),
            "ratio_to_bare": to_bare,
            "ratio_to_bare_median": median(to_bare),
            "fit_over_this_median": median(fit_to_it),
            "wall_s_median": median(facts["wall_s"] for facts in runs[name]),
            "trainable": runs[name][0]["trainable"],
            "steps": len(runs[name][0]["stamps"]),
        }
    return figures


def test_fit_keeps_up_with_a_bare_loop(
    work: dict[str, Any], run_contender: Any, run_script: Any, in_rounds: Any, publish: Any, markdown: Any
) -> None:
    job, folder = work["job"], work["folder"]
    contenders: dict[str, Callable[[int], dict[str, Any]]] = {
        "bare": lambda attempt: run_script("bare_loop", job, folder),
        "fit": lambda attempt: run_fit(work, run_contender, "fit", attempt),
        "fit_features": lambda attempt: run_fit(work, run_contender, "fit_features", attempt, features=True),
        "timm": lambda attempt: run_script("timm_task", job, folder),
    }
    notes, bf16 = [], computes_in_bf16()
    binary = os.environ.get("LIGHTLY_TRAIN_BIN")
    if bf16:
        contenders["fit_bf16"] = lambda attempt: run_fit(work, run_contender, "fit_bf16", attempt, teacher="bf16")
        contenders["fit_mixed"] = lambda attempt: run_fit(
            work, run_contender, "fit_mixed", attempt, teacher="bf16", precision="bf16-mixed"
        )
    else:
        notes.append("bf16 left out: this processor does not compute in it.")
    if binary:
        contenders["lightly"] = lambda attempt: run_lightly(work, run_contender, Path(binary), "32-true")
        if bf16:
            contenders["lightly_mixed"] = lambda attempt: run_lightly(work, run_contender, Path(binary), "bf16-mixed")
    else:
        notes.append("lightly-train left out: LIGHTLY_TRAIN_BIN does not name its executable (see README.md).")
    runs = in_rounds(contenders, ROUNDS)

    figures = summarise(runs)
    header = ["contender", "tiles/s, median (range)", "ratio to bare loop", "`fit` over this", "whole command, s"]
    rows = [
        [
            row["label"],
            f"{row['tiles_per_s_median']:.2f} ({min(row['tiles_per_s']):.2f} to {max(row['tiles_per_s']):.2f})",
            f"{row['ratio_to_bare_median']:.3f}",
            f"{row['fit_over_this_median']:.3f}",
            f"{row['wall_s_median']:.1f}",
        ]
        for row in figures.values()
    ]
    settings = {"tiles": TILES, "rounds": ROUNDS, "batch_size": BATCH_SIZE, "warm_up_steps": WARM_UP}
    what = f"{TEACHER} to {STUDENT}, fp32 unless said, {TILES} tiles, batch {BATCH_SIZE}, {ROUNDS} rounds"
    publish(
        "training",
        {"settings": settings, "notes": notes, "contenders": figures},
        "\n".join([f"Training: {what}", "", markdown(header, rows), *notes]),
    )
    assert figures["fit"]["trainable"] == figures["bare"]["trainable"]
    assert figures["fit"]["steps"] == figures["bare"]["steps"] == TILES // BATCH_SIZE
    assert figures["fit"]["ratio_to_bare_median"] >= 0.95
    if binary and bf16:
        pairs = zip(figures["fit_bf16"]["tiles_per_s"], figures["lightly"]["tiles_per_s"], strict=True)
        assert median(ours / theirs for ours, theirs in pairs) >= AHEAD


def test_two_students_share_each_forward_of_the_teacher(
    work: dict[str, Any], run_contender: Any, in_rounds: Any, publish: Any, markdown: Any
) -> None:
    """Two such students at once, beside one after the other; without a teacher's second pass 1.34 times as fast."""
    contenders: dict[str, Callable[[int], dict[str, Any]]] = {
        "fit": lambda attempt: run_fit(work, run_contender, "one", attempt),
        "fit_two": lambda attempt: run_fit(work, run_contender, "two", attempt, two=True),
    }
    runs = in_rounds(contenders, ROUNDS)
    speeds = {name: [tiles_per_s(facts) for facts in rounds] for name, rounds in runs.items()}
    gains = [2 * two / one for one, two in zip(speeds["fit"], speeds["fit_two"], strict=True)]
    rows = [[LABELS[name], f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})"] for name, own in speeds.items()]
    gain = f"Both at once over one after the other: {median(gains):.3f} ({min(gains):.3f} to {max(gains):.3f})"
    what = f"Two students: {TEACHER} to {STUDENT} twice, {TILES} tiles, batch {BATCH_SIZE}, {ROUNDS} rounds"
    table = markdown(["contender", "tiles/s, median (range)"], rows)
    publish("two_students", {"tiles_per_s": speeds, "gains": gains}, "\n".join([what, "", table, "", gain]))
    assert runs["fit_two"][0]["trainable"] == 2 * runs["fit"][0]["trainable"]
    assert median(gains) >= 1.2


def computes_in_bf16() -> bool:
    """Whether this processor multiplies bf16 numbers itself; elsewhere bf16 is slower than fp32."""
    facts = Path("/proc/cpuinfo")
    return facts.is_file() and any(flag in facts.read_text() for flag in ("avx512_bf16", "amx_bf16"))
