"""A teacher small enough to train under in a test, and the recipe around it."""

from pathlib import Path
from typing import Any

import pytest

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "reg_tokens": 2}


@pytest.fixture
def teacher_folder(tiny_teacher: Path) -> Path:
    """A random ViT with registers, exported as a folder."""
    return tiny_teacher


@pytest.fixture
def recipe(teacher_folder: Path, packed: Path) -> dict[str, Any]:
    """A whole configuration, as a user would write it: two teachers' worth of options on tiny models."""
    return {
        "seed_everything": 0,
        "model": {
            "teachers": {"tiny": {"weights": str(teacher_folder)}},
            "student": {
                "architecture": "vit_tiny_patch16_224",
                "model_args": {**TINY, "embed_dim": 16, "depth": 2, "drop_path_rate": 0.2},
                "image_px": 32,
            },
            "objectives": [
                {"loss": {"class_path": "pathokd.losses.CosineSmoothL1"}, "tokens": "cls", "view": "student"},
                {"loss": {"class_path": "pathokd.losses.Cosine"}, "tokens": "patches", "weight": 0.5},
            ],
            "optim": {"lr": 1e-3},
            "standardize_steps": 4,
            "ema_momentum": [0.9, 1.0],
        },
        "data": {
            "tiles": str(packed),
            "batch_size": 4,
            "workers": 2,
            "geometry": {"size_px": 32, "scale": [0.5, 1.0]},
            "photometric": {
                "student": [{"class_path": "albumentations.RandomBrightnessContrast", "init_args": {"p": 1.0}}]
            },
            "val_fraction": 0.3,
        },
        "trainer": {"max_epochs": 3, "accumulate_grad_batches": 2, "accelerator": "cpu", "devices": 1},
    }


@pytest.fixture
def cpu_shards() -> None:
    """Skips a test of FSDP2 where torch has it for GPUs only."""
    from pathokd.distill.strategy import shards_on_cpu

    if not shards_on_cpu():
        pytest.skip("FSDP2 of torch 2.6 runs on no CPU")
