"""Tiles per second of `pathokd fit` from stored targets, beside the same fit with its teacher running and a bare loop.

The bare loop has no teacher either: the student alone, tiles decoded and targets in memory. Every contender is a
fresh process that notes the end of each step; tiles/s counts the steps after the first `WARM_UP`. Each round runs all
contenders once, in rotating order; ratios are taken within a round, and their median is the figure.
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

from pathokd.cli.main import main
from pathokd.files import write_json
from pathokd.slides.manifest import TileSpec

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3 * 3600)]

TILES = int(os.environ.get("PATHOKD_BENCH_TILES", "768"))
ROUNDS = int(os.environ.get("PATHOKD_BENCH_ROUNDS", "5"))
BATCH_SIZE = 16
WARM_UP = 2
STUDENT = "vit_tiny_patch16_224"
EMBEDDED = Path(__file__).parents[2] / "tile_data/teacher"
PAIRS: dict[str, dict[str, Any]] = {
    "vits": {"label": "ViT-S/16 to ViT-Ti/16", "student_args": {}},
    "embedded": {
        "label": "embedded ViT-Ti/14 to 3 of its blocks",
        "student_args": {"patch_size": 14, "depth": 3, "reg_tokens": 4, "no_embed_class": True},
    },
}
LABELS = {
    "student": "bare PyTorch loop, student alone, tiles and targets in memory",
    "online": "`pathokd fit`, the teacher running",
    "cached": "`pathokd fit`, stored targets (fp16, all patches)",
}


@pytest.fixture(scope="module")
def work(bench_slide: Path, cut_tiles: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same tiles packed and decoded, and a teacher with random weights for ViT-S."""
    folder = tmp_path_factory.mktemp("cached")
    packed = cut_tiles(bench_slide, folder, TileSpec(), TILES)
    assert len(packed) == TILES, f"the slide has {len(packed)} tiles, set PATHOKD_BENCH_TILES lower"
    torch.manual_seed(1)
    save_file(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), folder / "vits.safetensors")
    teachers = {
        "vits": {"weights": str(folder / "vits.safetensors"), "architecture": "vit_small_patch16_224"},
        "embedded": {"weights": str(EMBEDDED)},
    }
    for pair, teacher in teachers.items():
        words = [teacher["weights"], str(folder / "packed"), "--tokens", "patches", "--out", str(folder / f"{pair}-t")]
        more = ["--architecture", teacher["architecture"]] if "architecture" in teacher else []
        assert main(["cache", *words, *more]) == 0
    return {"folder": folder, "teachers": teachers}


def fit_config(work: dict[str, Any], pair: str, out: Path, *, cached: bool) -> dict[str, Any]:
    """What `bare_loop.py` does, as a config."""
    folder: Path = work["folder"]
    teacher = {"targets": str(folder / f"{pair}-t")} if cached else work["teachers"][pair]
    return {
        "model": {
            "teachers": {"t": teacher},
            "student": {"architecture": STUDENT, "model_args": PAIRS[pair]["student_args"]},
            "objectives": [
                {"loss": {"class_path": "pathokd.losses.MSE"}, "tokens": "cls"},
                {"loss": {"class_path": "pathokd.losses.Cosine"}, "tokens": "patches"},
            ],
            "optim": {"weight_decay": [0.04, 0.04]},
            "standardize_steps": 0,
            "ema_momentum": None,
        },
        "data": {"tiles": str(folder / "packed"), "batch_size": BATCH_SIZE, "val_fraction": 0.0},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "fit_stopwatch.FitStopwatch", "init_args": {"out": str(out)}}],
        },
    }


def run_fit(work: dict[str, Any], run_contender: Any, pair: str, attempt: int, *, cached: bool) -> dict[str, Any]:
    folder: Path = work["folder"]
    name = f"{pair}-{'cached' if cached else 'online'}"
    config, out = folder / f"{name}.yaml", folder / f"{name}.out.json"
    write_json(config, fit_config(work, pair, out, cached=cached))
    cli = [sys.executable, "-c", "from pathokd.cli.main import entry; entry()"]
    return run_contender([*cli, "fit", "--config", str(config), "--out", str(folder / f"{name}-{attempt}")], out)


def tiles_per_s(facts: dict[str, Any]) -> float:
    """Speed after the warm-up steps, from one step's end to another's."""
    stamps = facts["stamps"][WARM_UP - 1 :]
    return BATCH_SIZE * (len(stamps) - 1) / (stamps[-1] - stamps[0])


@pytest.mark.parametrize("pair", PAIRS)
def test_stored_targets_train_at_the_students_own_speed(
    pair: str, work: dict[str, Any], run_contender: Any, run_script: Any, in_rounds: Any, publish: Any, markdown: Any
) -> None:
    folder: Path = work["folder"]
    job = {
        "student_architecture": STUDENT,
        "student_args": PAIRS[pair]["student_args"],
        "tiles": str(folder / "tiles.npy"),
        "targets": str(folder / f"{pair}-t"),
        "batch_size": BATCH_SIZE,
    }
    contenders: dict[str, Callable[[int], dict[str, Any]]] = {
        "student": lambda attempt: run_script("bare_loop", job, folder),
        "online": lambda attempt: run_fit(work, run_contender, pair, attempt, cached=False),
        "cached": lambda attempt: run_fit(work, run_contender, pair, attempt, cached=True),
    }
    runs = in_rounds(contenders, ROUNDS)
    names = list(contenders)

    speeds = {name: [tiles_per_s(facts) for facts in rounds] for name, rounds in runs.items()}
    ratios = {name: [c / s for c, s in zip(speeds["cached"], speeds[name], strict=True)] for name in names}
    rows = [
        [
            LABELS[name],
            f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})",
            f"{median(ratios[name]):.3f}",
            f"{median(facts['wall_s'] for facts in runs[name]):.1f}",
        ]
        for name, own in speeds.items()
    ]
    header = ["contender", "tiles/s, median (range)", "`fit` from stored targets over this", "whole command, s"]
    what = f"{PAIRS[pair]['label']}, fp32, {TILES} tiles, batch {BATCH_SIZE}, {ROUNDS} rounds"
    publish(
        f"cached_{pair}",
        {"tiles": TILES, "rounds": ROUNDS, "batch_size": BATCH_SIZE, "speeds": speeds, "cached_over": ratios},
        "\n".join([f"Stored targets: {what}", "", markdown(header, rows)]),
    )
    assert runs["cached"][0]["trainable"] == runs["student"][0]["trainable"] == runs["online"][0]["trainable"]
    assert len(runs["cached"][0]["stamps"]) == len(runs["student"][0]["stamps"]) == TILES // BATCH_SIZE
    assert median(ratios["online"]) >= 1.9
    assert median(ratios["student"]) >= 0.95
