"""Callbacks: stop at the first non-finite loss, say how it goes without a terminal, keep the last state whole."""

import contextlib
import pickle
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from pathokd.errors import TrainingError
from pathokd.files import atomic_path
from pathokd.models.sharded import is_checkpoint, is_sharded, read_whole
from pathokd.processes import largest_of_processes, process_rank, world_size
from pathokd.progress import PLAIN_INTERVAL_S


class FiniteGuard(Callback):
    """Stops with the step, the loss parts and the tiles when a loss is not finite.

    Losses stay on the device and are looked at together every `every_n_steps`, and always before a checkpoint is
    written, so that the guard costs one synchronisation an interval and no broken weights are ever saved.

    Args:
        every_n_steps: batches between two looks; by default 1 on CPU and 50 elsewhere.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._pending: list[tuple[int, Tensor, Mapping[str, Tensor], list[str]]] = []  # loss: mean of all processes

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember this batch's loss; look at all that are pending when it is time."""
        self._pending.append((trainer.global_step, outputs["mean"], outputs["parts"], batch["key"]))
        interval = self.every_n_steps or (1 if pl_module.device.type == "cpu" else 50)
        if len(self._pending) >= interval:
            self.check()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before anything is written, at the weights too: a gradient may break them though its loss is finite.

        Raises:
            TrainingError: as `check`, or a weight is not finite.
        """
        self.check()
        mine = {
            name: getattr(weight, "to_local", lambda w=weight: w)() for name, weight in pl_module.named_parameters()
        }
        fine = torch.stack([weight.isfinite().all() for weight in mine.values()]).tolist()
        if largest_of_processes(int(not all(fine)), pl_module.device):  # of a sharded student perhaps another's part
            where = "" if all(fine) else f" ({list(mine)[fine.index(False)]} is the first that is not)"
            raise TrainingError(
                f"The weights are not finite before step {trainer.global_step}{where}, though the losses were: a "
                "gradient was not. Lower model.optim.lr, or train in fp32; the last checkpoint is from before that."
            )

    def check(self) -> None:
        """Look at the pending losses.

        Raises:
            TrainingError: one of them is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        finite = torch.stack([loss for _, loss, _, _ in pending]).isfinite().tolist()
        if all(finite):
            return
        step, _, parts, keys = pending[finite.index(False)]
        values = ", ".join(f"{name} = {float(value):.4g}" for name, value in parts.items())
        where = f" on process {process_rank()} of {world_size()}, and all say theirs" if world_size() > 1 else ""
        raise TrainingError(
            f"The loss is not finite at step {step}: {values}{where}. Its tiles are {', '.join(keys[:8])}"
            f"{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}. Look at them, lower model.optim.lr, or train in "
            "fp32; the last checkpoint is from before this step."
        )


def logs_now(trainer: L.Trainer) -> bool:
    """Whether Lightning writes down what this step logs. What it does not write would cost milliseconds a number."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


class DataWait(Callback):
    """Logs `train/data_wait`, the share of the time that the trainer waited for its tiles: more workers lower it."""

    def __init__(self) -> None:
        self._started = self._waited = 0.0
        self._logs = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        self._started, self._waited = time.perf_counter(), _waited_s(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask before the step is counted."""
        self._logs = logs_now(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the share since it was logged before, and start again."""
        if not self._logs:
            return
        now, waited = time.perf_counter(), _waited_s(trainer)
        pl_module.log("train/data_wait", (waited - self._waited) / max(now - self._started, 1e-9))
        self._started, self._waited = now, waited


def _waited_s(trainer: L.Trainer) -> float:
    """Seconds that the training data kept the trainer waiting; 0 of a loader that does not count them."""
    return float(getattr(trainer.train_dataloader, "waited_s", 0.0))


class PlainProgress(Callback):
    """One line every few seconds with step, loss, speed, wait for data and time left, for logs and pipes."""

    def __init__(self) -> None:
        self._started = self._said = self._waited = 0.0
        self._first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = self._said = time.monotonic()
        self._first, self._waited = trainer.global_step, _waited_s(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say a line if it is time."""
        now, done = time.monotonic(), trainer.global_step - self._first
        total = int(trainer.estimated_stepping_batches)
        last = trainer.global_step == total
        if not trainer.is_global_zero or done < 1 or (now - self._said < PLAIN_INTERVAL_S and not last):
            return
        waited = (_waited_s(trainer) - self._waited) / (now - self._said)
        self._said, self._waited = now, _waited_s(trainer)
        pace = (now - self._started) / done
        tiles = len(batch["key"]) * trainer.world_size * trainer.accumulate_grad_batches / pace
        line = (
            f"step {trainer.global_step}/{total}  loss {float(outputs['mean']):.4f}  {tiles:.1f} tiles/s  "
            f"{waited:.0%} waiting for data  "
            f"{(total - trainer.global_step) * pace:.0f} s left"
        )
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say the validation measures."""
        measures = [
            f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        ]
        if trainer.is_global_zero and not trainer.sanity_checking and measures:
            print(f"epoch {trainer.current_epoch}  {'  '.join(measures)}", file=sys.stderr, flush=True)  # noqa: T201


class FinalValidation(Callback):
    """Validates after the last step, so that the end is compared.

    Also where `max_steps` ends a run in mid-epoch, the last epoch is none that `check_val_every_n_epoch` names, or its
    last batch none that `val_check_interval` does.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See to the last epoch; not when it starts, as a run resumed within it starts none."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            self._validate_this_epoch(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask to stop once the steps are done; Lightning validates before it stops."""
        if _was_last(trainer):
            self._validate_this_epoch(trainer)
            trainer.should_stop = True

    def _validate_this_epoch(self, trainer: L.Trainer) -> None:
        if trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1


class StepEnds(Callback):
    """Knows which batch ends an optimiser step: gradients gathered within a step are in no checkpoint."""

    _step_before = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, to see whether this batch ends one."""
        self._step_before = trainer.global_step
        epochs = trainer.fit_loop.epoch_progress
        if epochs.total.ready == epochs.total.completed:
            # Resumed after the last batch of an epoch, Lightning begins the next one without counting it, and a
            # checkpoint of that epoch would be resumed as if it had not begun.
            epochs.increment_ready()
            epochs.increment_started()

    def ended_step(self, trainer: L.Trainer) -> bool:
        """Whether the batch that just ended did, with more to come.

        Not after the last batch of all: what is saved there counts as trained to the end, and a run killed in the final
        validation would be resumed without one. `LastCheckpoint` writes that state when all is done.
        """
        return trainer.global_step != self._step_before and not _was_last(trainer)


def _was_last(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended was the last of the training."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch


class LastCheckpoint(StepEnds, ModelCheckpoint):
    """`last.ckpt`, every few steps and at the end of training.

    Args:
        dirpath: where.
        every_n_train_steps: optimiser steps between two writes: at most this much work is lost by a kill.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int = 500) -> None:
        super().__init__(
            dirpath=dirpath, filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write if it is time, but never between the batches of one step."""
        if self.ended_step(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @property
    def state_key(self) -> str:
        """Key of this callback's state; must not depend on the interval, which a resumed run may change."""
        return "LastCheckpoint"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: there is one file, and which it is nobody has to remember."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on within the epoch in which a finished run ended, if there is more to do now.

        Lightning counts that epoch as done: by steps it would skip the rest of it and as much of the next one.
        """
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        finished = 0 < epochs["total"]["ready"] == epochs["total"]["completed"]
        more_steps = trainer.max_steps == -1 or checkpoint["global_step"] < trainer.max_steps
        more_epochs = trainer.max_epochs == -1 or epochs["current"]["completed"] < (trainer.max_epochs or 0)
        if finished and more_steps and (more_epochs or not batches["is_last_batch"]):
            for counts in ("total", "current"):  # as they were after its last batch
                epochs[counts]["processed"] -= 1
                epochs[counts]["completed"] -= 1
                batches[counts]["completed"] -= 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the final state; `fast_dev_run` keeps none, which the real run would take for one to go on with."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the epoch with the best validation measure.

    Args:
        dirpath: where.
        monitor: logged name of the measure.
        mode: `max` if more of it is better, or `min`.
    """

    def __init__(
        self, dirpath: str | Path, monitor: str = "val/cosine_cls", mode: Literal["min", "max"] = "max"
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the measure of best.ckpt, also where the run's folder was moved: Lightning would forget it."""
        here = Path(str(self.dirpath)) / "best.ckpt"
        if is_checkpoint(here) and state_dict["best_k_models"]:
            path, (score,) = str(here), state_dict["best_k_models"].values()
            now = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict = {**state_dict, **now, "best_k_models": {path: score}}
        super().load_state_dict(state_dict)


@contextlib.contextmanager
def damage_named(path: Any) -> Iterator[None]:
    """Turn what torch says of a file that is no checkpoint, or half of one, into a TrainingError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): copy it again, or name another by "
            "--ckpt_path."
        ) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill leaves the old one, never half of the new."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`."""
        with atomic_path(path) as part:
            super().save_checkpoint(checkpoint, part, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; of one in shards the whole model, so that a run on one device can validate it.

        Raises:
            TrainingError: damaged, or none.
        """
        if is_sharded(path):
            return read_whole(path)
        with damage_named(path):
            return super().load_checkpoint(path, *args, **kwargs)
