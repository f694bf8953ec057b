"""Ending a training that is told to: what it has learnt is kept, and it can go on later."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from pathokd.distill.callbacks import StepEnds
from pathokd.processes import largest_of_processes, process_rank, world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(StepEnds):
    """On Ctrl-C or SIGTERM, which schedulers send before they kill, ends the training after the step in hand.

    The state goes to last.ckpt, so a resumed run is the run that was never stopped. A second Ctrl-C ends at once, with
    the last checkpoint that is there. Several processes end at one step: they agree every few steps.

    Args:
        folder: of last.ckpt.
        every_n_steps: steps between two agreements; one process alone looks after each step.

    Raises:
        SystemExit: with 128 plus the signal's number, on the first process; with 0 on the others.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 10) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._told = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen. Lightning's own handler of SIGTERM saves nothing, and under SLURM none at all listens."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may; whoever runs a training elsewhere has signals of their own
        launcher = trainer.strategy.launcher
        kill: Callable[[int], None] | None = getattr(launcher, "kill", None)

        def told(number: int, frame: FrameType | None) -> None:
            if self._told and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self._told and kill is not None and number == signal.SIGTERM:
                kill(number)  # to the processes that this one started
            self._told = number
            if process_rank() == 0:  # not by print: what is interrupted may be a print
                os.write(2, b"\npathokd fit: stopping at the end of a step, to lose nothing.\n")

        self._before = {number: signal.signal(number, told) for number in _SIGNALS}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if some process was told to."""
        step = trainer.global_step
        if not self.ended_step(trainer) or (world_size() > 1 and step % self.every_n_steps):
            return
        number = largest_of_processes(self._told, pl_module.device)
        if not number:
            return
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if process_rank() != 0:
            raise SystemExit(0)
        sys.stderr.write(
            f"pathokd fit: stopped by {signal.Signals(number).name} after step {step}; the same command with "
            "--resume true goes on from there.\n"
        )
        raise SystemExit(128 + number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
