"""Two processes compute what one does: gloo on a CPU, through the command line."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

WEIGHTS = 2e-5
"""Largest difference allowed between weights of order 1: fp32 sums in another order, six steps of AdamW at 1e-3."""
LOGGED = 1e-4
"""Relative difference allowed between logged numbers."""


def with_processes(recipe: dict[str, Any], processes: int) -> dict[str, Any]:
    """The recipe on so many processes, with the same global batch of 8."""
    recipe = copy.deepcopy(recipe)
    recipe["data"]["batch_size"] = 8 // processes
    recipe["trainer"] |= {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    return recipe


def start(recipe: dict[str, Any], out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`pathokd fit` in a process group of its own."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "pathokd.cli", "fit", "--config", str(config), "--out", str(out), *more]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(recipe: dict[str, Any], out: Path, *more: str) -> dict[str, Any]:
    """Run to the end; the last checkpoint."""
    assert start(recipe, out, *more).wait(timeout=200) == 0, out.with_suffix(".log").read_text()
    checkpoint: dict[str, Any] = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


@pytest.fixture
def gathered(recipe: dict[str, Any], tiny_prototypes: Path) -> dict[str, Any]:
    """Everything that looks beyond its own tile: statistics, KoLeo, prototypes, clipping, validation in shares."""
    student = recipe["model"]["student"]["model_args"]
    # Stochastic depth draws other noise on each process. A bias of keys changes nothing, so its gradient is rounding,
    # which AdamW makes steps of.
    student |= {"drop_path_rate": 0.0, "qkv_bias": False}
    head = {"head": str(tiny_prototypes)}
    recipe["model"]["objectives"] += [
        {"loss": {"class_path": "pathokd.losses.KoLeo"}, "weight": 0.1, "view": "student"},
        {"loss": {"class_path": "pathokd.losses.DINO", "init_args": {**head, "diagonal": True}}, "view": "student"},
        {
            "loss": {"class_path": "pathokd.losses.IBOT", "init_args": {**head, "centring": "sinkhorn"}},
            "tokens": "patches",
        },
    ]
    recipe["model"] |= {"fidelity_tiles": 13, "standardize_steps": 3}
    recipe["data"] |= {"val_batch_size": 3, "workers": 0}
    recipe["trainer"] |= {"gradient_clip_val": 0.1, "log_every_n_steps": 1}
    return recipe


def logged(out: Path) -> pd.DataFrame:
    table = pd.read_csv(next((out / "metrics").rglob("metrics.csv")))
    return table.groupby("step").first()


def test_two_processes_train_as_one_does(gathered: dict[str, Any], tmp_path: Path) -> None:
    one = run(with_processes(gathered, 1), tmp_path / "one")
    two = run(with_processes(gathered, 2), tmp_path / "two")
    assert one["global_step"] == two["global_step"] >= 6
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=WEIGHTS, atol=WEIGHTS, msg=name)
    a, b = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert list(a) == list(b)
    assert {"train/loss", "val/cka", "val/knn_overlap", "val/cosine_patches", "val/kl_cls"} <= {*a}
    pd.testing.assert_frame_equal(a, b, rtol=LOGGED, atol=LOGGED)
    best = [torch.load(tmp_path / name / "checkpoints/best.ckpt", weights_only=True) for name in ("one", "two")]
    assert best[0]["epoch"] == best[1]["epoch"]
