"""A student in training: its network, the average of it, and the weights of its terms."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.distill.balance import Balance
from pathokd.distill.batch_features import StudentCache
from pathokd.distill.network import ProjectedStudent
from pathokd.distill.objective import Objective, distinct_names
from pathokd.distill.terms import Shared, term
from pathokd.models.ema import Ema
from pathokd.models.student import FIRST, StudentSpec


class Losses(NamedTuple):
    """The weighted sum and its unweighted parts by name, all scalars."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]


class Trainee(nn.Module):
    """One student of a run; several have teachers, targets and objectives in common, and nothing else.

    Args:
        net: the student with its heads, filled already.
        objectives: with their weights and shares.
        momentum: of the moving average at the first step; None keeps none.
    """

    def __init__(self, net: ProjectedStudent, objectives: Sequence[Objective], momentum: float | None) -> None:
        super().__init__()
        self.net = net
        self.ema = None if momentum is None else Ema(net, momentum)
        shares = any(objective.share is not None for objective in objectives)
        self.balance = Balance(objectives) if shares else None
        self._objectives = objectives

    @property
    def evaluated(self) -> ProjectedStudent:
        """What is validated and exported: the moving average if there is one."""
        averaged = self.net if self.ema is None else self.ema.model
        return averaged  # type: ignore[return-value]

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives by the names of their parts."""
        return dict(zip(distinct_names(self._objectives), self._objectives, strict=True))

    def losses(self, shared: Shared) -> Losses:
        """All objectives on a batch; the network sees each view once."""
        seen = StudentCache(self.net, shared.batch["views"])
        parts = {name: term(name, objective, self.net, seen, shared) for name, objective in self.objectives.items()}
        if self.balance is not None and self.training:
            self.balance.update(torch.stack([*parts.values()]))
        total = next(iter(parts.values())).new_zeros(())
        for weight, part in zip(self.weights(), parts.values(), strict=True):
            total = total + weight * part
        return Losses(total, parts)

    def weights(self) -> list[Any]:
        """Factor of each objective at this moment: its own, or what keeps it at its share."""
        own = [objective.weight for objective in self._objectives]
        return own if self.balance is None else list(self.balance.now())


def under(name: str, key: str) -> str:
    """How a figure `key` of the student `name` is called: the first one's go without its name."""
    return key if name == FIRST else f"{name}/{key}"


def named_students(
    first: StudentSpec, others: Mapping[str, StudentSpec], teachers: Mapping[str, Any]
) -> dict[str, StudentSpec]:
    """The students by name.

    Raises:
        ValueError: a name that measures, weights or files cannot have.
    """
    taken = {FIRST, "weight", *dir(nn.ModuleDict())}  # of measures, and of the modules' own methods
    for name in teachers:
        if name in taken or "." in name or "/" in name:
            raise ValueError(
                f"teachers has the name {name!r}, which holds a dot or slash or is taken by pathokd or torch: choose "
                "another, such as h0mini."
            )
    for name in others:
        if name in taken or name in teachers or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ValueError(
                f"more_students has the name {name!r}, which is {FIRST!r} itself, a teacher's, taken by pathokd or "
                "torch, or not letters, digits, - and _: choose another, such as vits."
            )
    return {FIRST: first, **others}
