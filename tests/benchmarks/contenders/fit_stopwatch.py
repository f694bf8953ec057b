"""A Lightning callback that notes when each training step of `pathokd fit` ends; named in the benchmark's config."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class FitStopwatch(Callback):
    """Writes the end time of every step, as the other contenders do.

    Args:
        out: JSON file.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self._stamps: list[float] = []
        self._loss = float("nan")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = float(outputs["loss"])
        self._stamps.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        facts = {"stamps": self._stamps, "loss": self._loss, "trainable": trainable}
        Path(self.out).write_text(json.dumps(facts))
