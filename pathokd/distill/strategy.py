"""How a training may be spread over devices: one device, DDP, or FSDP2, which shards student, average and AdamW."""

import os
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from pathokd.distill.network import ProjectedStudent
from pathokd.errors import TrainingError


class FullyShardedStrategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`: each process holds its share of the student, its average and AdamW's moments.

    Blocks are put together when they are needed. Checkpoints are assembled to the one file that DDP writes too: a
    student takes a few GiB at most, and export, the atomic write and another strategy need no other path.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Shard over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="FSDP2 over all processes")


def check_strategy(trainer: L.Trainer, *, compiled: bool = False) -> None:
    """Refuse strategies that are not tested, and processes that do not know of each other.

    Args:
        trainer: with its strategy.
        compiled: whether the student is to be compiled.

    Raises:
        TrainingError: another strategy; a compiled student that is sharded; or `torchrun` started more processes than
            the trainer counts.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy):
        raise TrainingError(
            f"trainer.strategy is {type(strategy).__name__}, which pathokd does not train with: set it to ddp, or to "
            "fsdp2 for a student that does not fit beside its teacher, or leave it out."
        )
    if compiled and isinstance(strategy, FullyShardedStrategy):
        raise TrainingError("model.compile is not tested with trainer.strategy fsdp2: set model.compile to false.")
    started = int(os.environ.get("WORLD_SIZE", "1")) if torch.distributed.is_torchelastic_launched() else 1
    if started not in (1, trainer.world_size):
        raise TrainingError(
            f"torchrun started {started} processes and the trainer counts {trainer.world_size}: each would train by "
            "itself and overwrite the others; give trainer.devices the processes per node, trainer.num_nodes the "
            "nodes, and set trainer.strategy to ddp."
        )


def shards_of(trainer: L.Trainer) -> int:
    """Number of parts that the student is cut into; 1 keeps it whole."""
    return trainer.world_size if isinstance(trainer.strategy, FullyShardedStrategy) else 1


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
