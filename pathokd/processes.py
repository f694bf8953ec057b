"""What the processes of one training say to each other, and on how many cores a process may run.

What says something gives back, alone, what it was given; every process must call it equally often and in the same
order, or all of them wait for ever.
"""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may run on: a scheduler may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(mine: T) -> list[T]:
    """The object of each process, in the order of ranks; for what is said once an epoch, not once a step."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


@torch.no_grad()
def gather_equal(x: Tensor) -> list[Tensor]:
    """The tensor of each process, all of one shape, in the order of ranks; without gradient."""
    if world_size() == 1:
        return [x]
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(found, x.detach().contiguous())
    return found


@torch.no_grad()
def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of a tensor over the processes, without gradient; `x` itself stays as it is."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def largest_of_processes(value: int, device: torch.device) -> int:
    """The largest number that any process has; waits for the device, so it is not for every step."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes below each other, (processes x rows, ...), in the order of ranks; with gradient.

    For losses that compare the tiles of a batch with each other. Each process computes the loss of the whole batch; the
    gradients that all of them send back to a row are added up, and DDP's mean over processes makes of it the gradient
    that one process with the whole batch has.

    Args:
        x: as many rows on every process.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _GatherRows.apply(x)
    return gathered


class _GatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return torch.cat(gather_equal(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[process_rank() * ctx.rows :][: ctx.rows]
