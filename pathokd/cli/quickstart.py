"""`pathokd quickstart`: the whole chain on the slides that come with the repository, command by command."""

import json
import shlex
import shutil
import time
from pathlib import Path

import pathokd
from pathokd.errors import PathokdError
from pathokd.files import write_json, write_text

ROOT = Path(pathokd.__file__).resolve().parents[1]
"""The checkout; slides, teacher and configurations lie beside the package in it."""
_MADE = ("tiles", "packed", "run", "student", "control", "embeddings")
_MARK = ".quickstart"
"""Tells a folder of this verb from others that hold a run."""


def quickstart(*, out: str = "runs/quickstart", steps: int | None = None, overwrite: bool = False) -> int:
    """Distil the embedded teacher on phantom slides and compare.

    Args:
        out: Folder for everything this makes; summary.json holds the numbers.
        steps: Optimiser steps; by default what configs/distill/quickstart.yaml says.
        overwrite: Start over although the folder holds an earlier quickstart.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"--steps should be at least 1, got {steps}.")
    started = time.monotonic()
    folder = _prepare(Path(out), overwrite)
    teacher = ROOT / "tile_data/teacher"
    config = ROOT / "configs/distill/quickstart.yaml"
    fit = ["fit", "--config", config, "--data.tiles", f"{folder}/packed", "--out", f"{folder}/run"]
    fit += ["--model.teachers.embedded.weights", teacher]
    if _bf16_pays():
        fit += ["--trainer.precision", "bf16-mixed", "--model.teachers.embedded.precision", "bf16"]
    fit += ["--trainer.devices", "1"]  # other processes would run the whole quickstart again
    if steps:
        fit += ["--trainer.max_steps", steps]
    _run("tile", ROOT / "tile_data/phantom/slides.csv", "--out", f"{folder}/tiles")
    _run("pack", f"{folder}/tiles", "--out", f"{folder}/packed")
    _run(*fit)
    _run("export", f"{folder}/run", "--out", f"{folder}/student")
    _run("export", f"{folder}/run", "--out", f"{folder}/control", "--untrained")
    _run("embed", f"{folder}/student", f"{folder}/tiles", "--out", f"{folder}/embeddings")
    models = [f"teacher={teacher}", f"student={folder}/student", f"control={folder}/control"]
    data = ["--data", f"{folder}/packed", "--fidelity", "student:teacher", "--out", f"{folder}/comparison.json"]
    _run("compare", *models, *data)
    _summarise(folder, time.monotonic() - started)
    return 0


def _prepare(folder: Path, overwrite: bool) -> Path:
    if not (ROOT / "tile_data/phantom/slides.csv").is_file():
        raise PathokdError(
            f"quickstart needs the slides in tile_data, which {ROOT} does not hold: clone the repository and "
            "install it with `pip install -e .`."
        )
    made = [name for name in _MADE if (folder / name).exists()]
    if made and not (folder / _MARK).exists():
        raise PathokdError(f"{folder} holds {', '.join(made)}, which no quickstart made: choose another --out.")
    if "run" in made:
        if not overwrite:
            raise PathokdError(f"{folder} holds an earlier quickstart: pass --overwrite to redo it, or another --out.")
        for name in made:
            shutil.rmtree(folder / name, ignore_errors=True)
    write_text(folder / _MARK, "--overwrite may delete what lies here\n")
    return folder


def _bf16_pays() -> bool:
    """Whether the device multiplies clearly faster in bf16."""
    import torch

    from pathokd.models.device import bf16_time

    return torch.cuda.is_available() or bf16_time() < 1 / 1.3


def _run(*words: object) -> None:
    """Print a command and run it in this process."""
    from pathokd.cli.main import main

    args = [str(word) for word in words]
    print(f"\n$ pathokd {shlex.join(args)}", flush=True)
    code = main(["--debug", *args])
    if code:
        raise PathokdError(f"`pathokd {args[0]}` ended with code {code}; what it printed says why.")


def _summarise(folder: Path, seconds: float) -> None:
    summary = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    write_json(folder / "summary.json", {**summary, "seconds": round(seconds, 1)})
    print(
        f"\nDone in {seconds / 60:.1f} minutes. The numbers are in {folder}/summary.json, "
        f"the student in {folder}/student."
    )
