"""How a training may be spread over devices: one device, DDP, or FSDP2, which shards student, average and AdamW."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from pathokd.distill.callbacks import damage_named
from pathokd.distill.network import ProjectedStudent
from pathokd.distill.provenance import check_shapes
from pathokd.errors import TrainingError
from pathokd.models.encoder import Encoder
from pathokd.models.sharded import MODEL, SHARDS, is_sharded, model_shapes, read_facts, read_shards, write_shards

_OPTIMIZERS, _GROUPS = "optimizers", "optimizer_groups"


class FullyShardedStrategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`: each process holds its share of the student, its average and AdamW's moments.

    Blocks are put together when they are needed.

    Args:
        sharded_checkpoints: write checkpoints as folders into which each process writes its own part
            (`pathokd.models.sharded`), by class_path: pathokd.distill.strategy.FullyShardedStrategy and init_args.
            Off, they are assembled to the one file that DDP writes too. That is the default, since a student, its
            average and AdamW's moments take 16 bytes a parameter, 1.4 GB of a ViT-B and 18 GB of a ViT-g: the first
            process can hold them, and one file is read by any strategy. Turn it on where it cannot, or where writing
            keeps the others waiting; all nodes then need one file system. A run keeps the form it began with.
        kwargs: of Lightning's ModelParallelStrategy.
    """

    def __init__(self, sharded_checkpoints: bool = False, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=sharded_checkpoints, **kwargs)
        self.sharded_checkpoints = sharded_checkpoints

    def setup_environment(self) -> None:
        """Shard over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, or shards of which there is always a whole one."""
        if not self.sharded_checkpoints:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        tensors = {MODEL: checkpoint.pop("state_dict")}
        if "optimizer_states" in checkpoint:
            states = checkpoint.pop("optimizer_states")
            tensors[_OPTIMIZERS] = {str(i): state["state"] for i, state in enumerate(states)}
            checkpoint[_GROUPS] = [state["param_groups"] for state in states]
        write_shards(tensors, checkpoint, self.broadcast(str(filepath)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read either form; of shards each process its own parts.

        Raises:
            TrainingError: damaged, or of other networks; reading by itself leaves out what the run does not have.
            WeightsError: a shard is missing or damaged.
        """
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            get_optimizer_state_dict,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        path, module = Path(self.broadcast(str(checkpoint_path))), self.model
        if module is None:
            raise RuntimeError("The strategy holds no model yet.")
        state: dict[str, Any] = get_model_state_dict(module)
        if not is_sharded(path):
            with damage_named(path):
                stored = torch.load(path, mmap=True, map_location="cpu", weights_only=True).get("state_dict", {})
            check_shapes(state, {name: value.shape for name, value in stored.items()})
            return super().load_checkpoint(path, weights_only)
        check_shapes(state, model_shapes(path))
        facts = read_facts(path)
        read_shards({MODEL: state}, path)
        set_model_state_dict(module, state)
        for number, (optimizer, groups) in enumerate(zip(self.optimizers, facts.get(_GROUPS, []), strict=False)):
            moments = get_optimizer_state_dict(module, optimizer)["state"]
            read_shards({_OPTIMIZERS: {str(number): moments}}, path)
            set_optimizer_state_dict(module, optimizer, {"state": moments, "param_groups": groups})
        return facts


StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="FSDP2 over all processes")


def shards_on_cpu() -> bool:
    """Whether this torch has FSDP2 for more than GPUs."""
    return hasattr(torch.cpu.Stream, "record_event")


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse what is not tested or cannot be, and processes that do not know of each other.

    Raises:
        TrainingError: another strategy, FSDP2 on a CPU of a torch that has it for GPUs only, a device without fp64,
            half precision throughout, no batch to a step or to an epoch, batches to overfit, an end by the clock, or
            `torchrun` started more processes than the trainer counts.
    """
    strategy = trainer.strategy
    if strategy.root_device.type == "mps":
        raise TrainingError(
            "Training sums the statistics of its targets in fp64, which Apple's MPS does not have: set "
            "trainer.accelerator to cpu."
        )
    if str(trainer.precision) in ("bf16-true", "16-true"):
        raise TrainingError(
            f"trainer.precision is {trainer.precision}, which would round the teacher's normalisation, the targets' "
            "statistics and the student's average to three digits: set it to bf16-mixed, or to 32-true."
        )
    if trainer.accumulate_grad_batches < 1:
        raise TrainingError(
            f"trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}."
        )
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit > 0:
        raise TrainingError(
            f"trainer.overfit_batches is {overfit}, and each epoch draws other tiles, so none would be "
            "seen again: leave it out, and give data.tiles a few tiles with data.val_fraction 0."
        )
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise TrainingError(
            "trainer.max_time ends a run between two steps of its schedules, from where it cannot go on as it would "
            "have: leave it out, and start it as `timeout 2h pathokd fit ...` or under a scheduler with a limit; told "
            "to stop, a run keeps its state, and --resume true goes on from there."
        )
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise TrainingError(
            f"trainer.check_val_every_n_epoch must be at least 1, got {trainer.check_val_every_n_epoch}: to train "
            "without validation set data.val_fraction to 0."
        )
    if trainer.limit_train_batches == 0:
        raise TrainingError("trainer.limit_train_batches is 0, which trains nothing: leave it out, or set it to 1.")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy):
        raise TrainingError(
            f"trainer.strategy is {type(strategy).__name__}, which pathokd does not train with: set it to ddp, or to "
            "fsdp2 for a student that does not fit beside its teacher, or leave it out."
        )
    if isinstance(strategy, FullyShardedStrategy) and strategy.root_device.type == "cpu" and not shards_on_cpu():
        raise TrainingError(
            f"FSDP2 of torch {torch.__version__} shards over GPUs only: set trainer.strategy to ddp, or take "
            "a later torch."
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if torch.distributed.is_torchelastic_launched() else 1
    if started not in (1, trainer.world_size):
        raise TrainingError(
            f"torchrun started {started} processes and the trainer counts {trainer.world_size}: each would train by "
            "itself and overwrite the others; give trainer.devices the processes per node, trainer.num_nodes the "
            "nodes, and set trainer.strategy to ddp."
        )


def check_form(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of one form where the run would write the other in its place.

    Raises:
        TrainingError: says what to set.
    """
    strategy = trainer.strategy
    writes, read = isinstance(strategy, FullyShardedStrategy) and strategy.sharded_checkpoints, SHARDS in checkpoint
    if read and not writes:
        raise TrainingError(
            "This checkpoint lies in shards and this run would write whole files in their place: resume with "
            "trainer.strategy: {class_path: pathokd.distill.strategy.FullyShardedStrategy, init_args: "
            "{sharded_checkpoints: true}}."
        )
    if writes and not read:
        raise TrainingError(
            "This checkpoint is one file and this run would write shards in its place: resume with trainer.strategy: "
            "fsdp2, without sharded_checkpoints."
        )


def shards_of(trainer: L.Trainer) -> int:
    """Number of parts that the student is cut into; 1 keeps it whole."""
    return trainer.world_size if isinstance(trainer.strategy, FullyShardedStrategy) else 1


def compile_student(encoder: Encoder, trainer: L.Trainer | None, **options: Any) -> None:
    """Let torch compile the student: whole, or block by block where FSDP2 will cut it, which has to come after.

    Blocks run one code. Torch takes each rate of stochastic depth for a variant of it, and each size of crop, and
    leaves a code uncompiled after 8 variants: the limit is raised to what the blocks may need.

    Args:
        encoder: built, not yet `spread`.
        trainer: with its strategy; None compiles whole.
        options: of `torch.compile`.
    """
    if trainer is None or not isinstance(trainer.strategy, FullyShardedStrategy):
        encoder.compile(**options)
        return
    blocks = list(encoder.model.blocks)
    limits = torch._dynamo.config
    called = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # torch 2.6
    for name, limit in ((called, 8 * len(blocks)), (f"accumulated_{called}", 16 * len(blocks))):
        setattr(limits, name, max(getattr(limits, name), limit))
    for block in blocks:
        block.compile(**options)


def spread(module: L.LightningModule, students: Iterable[ProjectedStudent]) -> None:
    """Make a built module ready for its strategy.

    Buffers (statistics, prototypes) are the same on every process, and prototypes are large, so DDP is told not to send
    them round at each step. FSDP2 cuts the students here, block by block.

    Args:
        module: built.
        students: the trained one and its average.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        module, [name for name, _ in module.named_buffers()]
    )
    strategy = None if module._trainer is None else module._trainer.strategy
    if isinstance(strategy, FullyShardedStrategy):
        from torch.distributed.fsdp import fully_shard

        mesh = strategy.device_mesh["data_parallel"]
        for student in students:
            for block in student.encoder.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(student, mesh=mesh)
