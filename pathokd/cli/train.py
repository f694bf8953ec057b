"""`pathokd fit|validate|test`: LightningCLI with pathokd's folder layout and callbacks."""

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from pathokd.cli.training_cost import SayCost
from pathokd.cli.wording import OneSentence
from pathokd.data.datamodule import TileDataModule
from pathokd.distill.callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    DataWait,
    FinalValidation,
    FiniteGuard,
    LastCheckpoint,
    PlainProgress,
)
from pathokd.distill.module import DistillationModule
from pathokd.distill.stopping import StopOnSignal
from pathokd.errors import TrainingError
from pathokd.files import write_text
from pathokd.models.device import keep_freed_memory
from pathokd.models.sharded import is_checkpoint, sweep_half

USAGE = "pathokd {verb} --config RECIPE.yaml [--config MORE.yaml ...] [--KEY VALUE ...]"


class TrainParser(OneSentence, LightningArgumentParser):
    """Lightning's parser, which answers in a sentence."""


class KeepConfig(SaveConfigCallback):
    """Writes the whole configuration of a fit to OUT/config.yaml, so that the run can be repeated or resumed."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: the run may still be refused, and the file be that of the one it was to go on from."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the file before the first step."""
        if trainer.is_global_zero and not self.already_saved:
            config = self.config.clone()
            if config.resume:  # a word of this start, not of the run: `validate` would take last.ckpt for best.ckpt
                config.resume, config.ckpt_path = False, None
            text = self.parser.dump(config, skip_none=False)
            write_text(Path(trainer.default_root_dir) / "config.yaml", text)
            self.already_saved = True


class OpenLogs(Callback):
    """Gives a fit its loggers once it starts: Lightning opens their files before it looks at tiles and checkpoint."""

    def __init__(self, loggers: list[Logger]) -> None:
        self.loggers = loggers

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Show them to the callbacks that ask for loggers, and open nothing."""
        if stage == "fit":
            self._attach(trainer, self.loggers)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hide them from Lightning, which would save them, before it compares a checkpoint's data with the run's."""
        self._attach(trainer, [])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach them."""
        self._attach(trainer, self.loggers)

    def _attach(self, trainer: L.Trainer, loggers: list[Logger]) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.loggers = loggers


class TrainCLI(LightningCLI):
    """LightningCLI with `--out`, `--resume`, loggers and checkpoints in their places."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add pathokd's own arguments."""
        parser.link_arguments("model.teachers", "data.targets", compute_fn=target_folders)
        parser.add_argument("--out", type=str, default="runs/distill", help="Folder of this run.")
        parser.add_argument(
            "--resume", type=bool, default=False, help="Go on from OUT/checkpoints/last.ckpt, exactly where it stopped."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="Optimiser steps between writes of last.ckpt."
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the whole checkpoint for hyperparameters, of which there are none in it."""

    def before_instantiate_classes(self) -> None:
        """Turn `--out` and `--resume` into what Lightning knows."""
        config = self.config[self.subcommand]
        config.trainer.default_root_dir = config.out
        if config.trainer.max_epochs is None:  # one epoch by default, which must not end a run of so many steps early
            config.trainer.max_epochs = -1 if config.trainer.max_steps > 0 else 1
        if self.subcommand == "fit" and 0 in (config.trainer.max_epochs, config.trainer.max_steps):
            raise TrainingError(
                f"trainer.max_epochs is {config.trainer.max_epochs} and trainer.max_steps {config.trainer.max_steps}: "
                "a run of 0 trains nothing; give the one that counts, and leave out the other or set it to -1."
            )
        if config.trainer.accelerator == "auto" and MPSAccelerator.is_available():
            config.trainer.accelerator = "cpu"  # MPS has no fp64, in which statistics are summed
            warnings.filterwarnings("ignore", "GPU available but not used")
        checkpoints = Path(config.out) / "checkpoints"
        if config.resume:
            if not is_checkpoint(checkpoints / "last.ckpt"):
                raise TrainingError(f"--resume found no {checkpoints}/last.ckpt: leave it out to start a new run.")
            config.ckpt_path = str(checkpoints / "last.ckpt")
            for part in checkpoints.rglob(".*.part"):  # what a killed run was writing
                part.unlink(missing_ok=True)
        elif self.subcommand == "fit" and not config.ckpt_path and any(map(is_checkpoint, checkpoints.glob("*.ckpt"))):
            raise TrainingError(
                f"{checkpoints} already holds a run: pass --resume true to go on with it, or another --out."
            )
        elif self.subcommand == "fit":
            for half in checkpoints.glob("*.ckpt"):
                sweep_half(half)
        if self.subcommand != "fit" and config.data.val_fraction == 0:
            raise TrainingError(
                f"data.val_fraction is 0, so there are no tiles to {self.subcommand} on: set it to what the run held "
                "out."
            )
        if self.subcommand != "fit" and not config.ckpt_path:
            found = [path for name in ("best", "last") if is_checkpoint(path := checkpoints / f"{name}.ckpt")]
            if not found:
                raise TrainingError(f"{checkpoints} holds no checkpoint: train first, or pass --ckpt_path.")
            config.ckpt_path = str(found[0])
        if "weights_only" in config:  # Lightning >= 2.6 asks; a checkpoint of pathokd holds nothing but plain data
            config.weights_only = True

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add loggers, callbacks and the atomic checkpoint writer."""
        config = self.config_init[self.subcommand]
        out, settings = Path(config.out), config.trainer
        given = settings.callbacks
        callbacks = list(given) if isinstance(given, Sequence) else [given] if given else []
        callbacks += self._callbacks(out / "checkpoints", config, callbacks)
        if settings.logger is None:
            loggers = [CSVLogger(str(out), name="metrics"), TensorBoardLogger(str(out), name="tensorboard")]
            kwargs["logger"] = False if self.subcommand == "fit" else loggers
            callbacks = [OpenLogs(loggers), *callbacks]  # before those that ask for loggers
        kwargs["callbacks"] = callbacks
        kwargs["enable_progress_bar"] = settings.enable_progress_bar is not False and sys.stderr.isatty()
        kwargs["plugins"] = [*(settings.plugins or []), AtomicCheckpointIO()]
        trainer: L.Trainer = super().instantiate_trainer(**kwargs)
        keep_freed_memory(trainer.strategy.root_device)
        return trainer

    def _callbacks(self, folder: Path, config: Any, given: Sequence[Callback]) -> list[Callback]:
        callbacks: list[Callback] = [FiniteGuard(), FinalValidation(), DataWait(), SayCost()]
        if config.trainer.enable_progress_bar is not False and not sys.stderr.isatty():
            callbacks.append(PlainProgress())
        if config.trainer.enable_checkpointing is not False:
            callbacks += [StopOnSignal(folder), LastCheckpoint(folder, config.checkpoint_every)]
            # Two of them would write one best.ckpt, each by its own measure.
            here = str(folder.resolve())
            theirs = any(isinstance(each, BestCheckpoint) and str(each.dirpath) == here for each in given)
            if config.data.val_fraction > 0 and not theirs:
                callbacks.append(BestCheckpoint(folder, *config.model.best_measure))
        return callbacks


def target_folders(teachers: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Teacher to the folder of its stored targets, of those that have one."""
    folders = {key: _targets_of(spec) for key, spec in (teachers or {}).items()}
    return {key: folder for key, folder in folders.items() if folder is not None} or None


def _targets_of(spec: Any) -> str | None:
    """Of a parsed teacher, which jsonargparse may still hold as a mapping or as class path and arguments."""
    if isinstance(spec, Namespace):
        spec = spec.as_dict()
    if isinstance(spec, Mapping):
        folder: str | None = spec.get("init_args", spec).get("targets")
        return folder
    return getattr(spec, "targets", None)


def train(subcommand: str, args: list[str]) -> TrainCLI:
    """Run `fit`, `validate` or `test` with command-line arguments `args`."""
    _quieten()
    try:
        return TrainCLI(
            DistillationModule,
            TileDataModule,
            save_config_callback=KeepConfig,
            seed_everything_default=0,
            trainer_defaults={
                "gradient_clip_val": 3.0,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                # The batch sampler already gives each process its share.
                "use_distributed_sampler": False,
            },
            auto_configure_optimizers=False,
            parser_class=TrainParser,
            parser_kwargs={"prog": "pathokd", subcommand: {"usage": USAGE.format(verb=subcommand)}},
            args=[subcommand, *args],
        )
    except MisconfigurationException as error:  # what Lightning does not accept
        raise TrainingError(str(error)) from error


def _quieten() -> None:
    """Silence advice that does not apply: modules in eval mode are the teachers, few workers are a choice."""
    warnings.filterwarnings("ignore", r".*module\(s\) in eval mode")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*exists and is not empty")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", ".*FSDP2-wrapped module .* returned a view tensor")  # nothing changes it in place
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # val_fraction: 0
    # A default of albumentations that is a tuple; in a list's place it means the same.
    warnings.filterwarnings("ignore", r"\s*Dump of a value that does not round-trip: a tuple")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
