"""Runs the `lightly-train` command unchanged, but for a Lightning callback that notes when each step ends.

Usage: PYTHON_OF_ITS_VENV lightly_stopwatch.py OUT.json LIGHTLY_TRAIN_BIN pretrain key=value ...
Imports nothing of pathokd: it runs in lightly-train's own environment.
"""

import functools
import json
import runpy
import sys
import time
from pathlib import Path

import pytorch_lightning
from pytorch_lightning.callbacks import Callback


class Stopwatch(Callback):
    """Writes the end time of every step, as the other contenders do."""

    def __init__(self, out: str) -> None:
        self.out, self.stamps, self.loss = out, [], float("nan")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.loss = float(outputs["loss"])
        self.stamps.append(time.perf_counter())

    def on_train_end(self, trainer, pl_module):
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        facts = {"stamps": self.stamps, "loss": self.loss, "trainable": trainable}
        Path(self.out).write_text(json.dumps(facts))


def main() -> None:
    out, command = sys.argv[1], sys.argv[2:]
    stopwatch, plain_init = Stopwatch(out), pytorch_lightning.Trainer.__init__

    @functools.wraps(plain_init)
    def with_stopwatch(self, *args, **kwargs):
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), stopwatch]
        plain_init(self, *args, **kwargs)

    pytorch_lightning.Trainer.__init__ = with_stopwatch
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
