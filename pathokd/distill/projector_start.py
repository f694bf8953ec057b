"""Projectors that begin where least squares puts them, so that a student which knows something is not pulled off it."""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pathokd.data.batch import TileBatch
from pathokd.distill.batch_features import StudentCache, TargetCache, for_each_crop, on_teachers_grid
from pathokd.distill.network import ProjectedStudent, head_key
from pathokd.distill.objective import Objective, Tokens
from pathokd.distill.prototypes import view_pairs
from pathokd.distill.trainee import under
from pathokd.distill.warm_start import unfolded
from pathokd.losses import AlignmentLoss
from pathokd.models.ema import reshard
from pathokd.models.projector import Projector
from pathokd.models.ridge import RidgeSums
from pathokd.models.standardize import Standardizer
from pathokd.progress import Bars


class Compared(NamedTuple):
    """What a projector is trained on."""

    teacher: str
    tokens: Tokens
    pairs: Sequence[tuple[str, str]]
    """Views of student and teacher."""

    @property
    def head(self) -> str:
        """Key of the projector."""
        return head_key(self.teacher, self.tokens)


def compared(
    objectives: Iterable[Objective], teacher_of: Callable[[Objective], str], crops: Collection[str]
) -> list[Compared]:
    """What the objectives train each projector on, in their order.

    Args:
        objectives: of a run.
        teacher_of: key of the teacher that an objective asks.
        crops: of the data.
    """
    pairs: dict[tuple[str, Tokens], list[tuple[str, str]]] = {}
    for objective in objectives:
        if isinstance(objective.loss, AlignmentLoss):
            pairs.setdefault((teacher_of(objective), objective.tokens), []).extend(view_pairs(objective, crops))
    return [Compared(*key, list(dict.fromkeys(found))) for key, found in pairs.items()]


def first_batches(loader: Iterable[TileBatch], count: int, *, say: bool) -> Iterator[TileBatch]:
    """`count` batches, shown as they go if `say`; the loader's reading processes end with them."""
    batches = iter(loader)
    with Bars() as bars, contextlib.closing(batches):  # type: ignore[type-var]
        some = itertools.islice(batches, count)
        yield from bars.track(some, "solving projectors: batches", count) if say else some


def described(told: Mapping[str, float], tiles: int) -> str:
    """Where projectors begin; `told` is what `solve` returned."""
    explained = ", ".join(f"{share:.0%} of {name}" for name, share in told.items() if share > 0)
    nothing = ", ".join(name for name, share in told.items() if not share > 0)
    solved = f"Projectors begin where ridge regression on {tiles:,} tiles puts them; in other tiles they explain "
    at_random = f"Ridge regression on {tiles:,} tiles explains nothing in others of {nothing}, which begin at random."
    return " ".join([f"{solved}{explained}."] * bool(explained) + [at_random] * bool(nothing))


class ProjectorStart:
    """Solves the last layer of a student's projectors by ridge regression of the teacher's tokens on the student's.

    A projector begun at random sends a gradient back that says nothing yet, and by the time that it does the student
    has lost some of the weights it was given.

    Args:
        net: the student.
        average: its moving average, which begins with the same projectors, or the student itself.
        compared: each projector that is to be solved.
        statistics: standardisers of the targets by `head_key`; empty for raw targets.

    Reference:
        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"
        (arXiv 2202.10054): the head first, then all.
    """

    def __init__(
        self, net: ProjectedStudent, average: ProjectedStudent, compared: Sequence[Compared], statistics: nn.ModuleDict
    ) -> None:
        self._net, self._average = net, average
        self._compared, self._statistics = compared, statistics
        self._sums: dict[str, RidgeSums] = {}

    def add(self, batch: TileBatch, targets: TargetCache) -> None:
        """Look at a batch.

        Args:
            batch: with the views.
            targets: of the same tiles.
        """
        seen = StudentCache(self._net, batch["views"])
        # By its name, so that all views and crops of a tile are in one, on however many processes.
        halves = torch.tensor([zlib.crc32(key.encode()) % 2 for key in batch["key"]])
        for term in self._compared:
            name, (teacher, tokens, pairs) = term.head, term
            projector: Projector = self._net.heads[name]  # type: ignore[assignment]
            for view, teacher_view in pairs:
                student = seen[view]
                # The last layer is one matrix, so that tokens may be averaged before it as well as after.
                x = on_teachers_grid(projector.net[:-1](getattr(student, tokens)), student, teacher, tokens, targets)
                y = for_each_crop(targets.get(teacher, tokens, teacher_view, student.grid), x)
                if name in self._statistics:  # which may still move: back to the teacher's own scale
                    y = self._scale(name).inverse(y)
                sums = self._sums.setdefault(name, RidgeSums(x.shape[-1], y.shape[-1], x.device))
                each = halves.to(x.device).repeat_interleave(len(x) // len(halves))
                for half in (0, 1):
                    sums.add(x[each == half], y[each == half], half)

    def finish(self) -> dict[str, float]:
        """Fill the projectors; one that tells nothing of its target in other tiles stays as it was.

        Returns:
            By projector, such as `h0.cls`, the share of the variance of its target that it tells in other tiles.
        """
        told = {}
        for term in self._compared:
            name = term.head
            found = self._sums[name].solve()
            told[f"{term.teacher}.{term.tokens}"] = found.explained
            if not found.explained > 0:  # shrunk to nothing, it would leave cosines without a direction
                continue
            weight, bias = found.weight, found.bias
            if name in self._statistics:
                weight, bias = unfolded(weight, bias, self._scale(name))
            for net in dict.fromkeys((self._net, self._average)):
                _fill(net, name, weight, bias)
        return told

    def _scale(self, name: str) -> Standardizer:
        return self._statistics[name]  # type: ignore[return-value]


def solve(
    starts: Mapping[str, ProjectorStart], batches: Iterable[TileBatch], targets_of: Callable[[TileBatch], TargetCache]
) -> dict[str, float]:
    """Solve the projectors of all students of a run, which share each forward of the teachers.

    Args:
        starts: by the student's name.
        batches: on the device of the training.
        targets_of: the teachers on a batch.

    Returns:
        As `ProjectorStart.finish`, of all students.
    """
    for batch in batches:
        targets = targets_of(batch)
        for start in starts.values():
            start.add(batch, targets)
            targets.counts = False
    return {under(name, key): share for name, start in starts.items() for key, share in start.finish().items()}


@torch.no_grad()
def _fill(net: ProjectedStudent, name: str, weight: Tensor, bias: Tensor) -> None:
    """Give a projector its last layer, also where several processes share the parameters out."""
    reshard(net)  # what is written to parameters that were put together for a forward would be lost
    projector: Projector = net.heads[name]  # type: ignore[assignment]
    last: nn.Linear = projector.net[-1]  # type: ignore[assignment]
    parameters: list[tuple[Any, Tensor]] = [(last.weight, weight), (last.bias, bias)]
    for parameter, value in parameters:
        whole = value.to(parameter.device, parameter.dtype)
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)
