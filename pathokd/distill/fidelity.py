"""How much of a teacher a student holds, accumulated over validation batches."""

import torch
from jaxtyping import Float
from torch import Tensor

from pathokd.metrics.retrieval import knn_overlap
from pathokd.metrics.similarity import linear_cka

NEIGHBOURS = 10


class Fidelity:
    """Cosine (CLS, patches), linear CKA and k-NN overlap between projected student and teacher.

    Cosines are means over all tokens seen. CKA and overlap need the features themselves, of which the first `max_tiles`
    are kept; they compare the student's own CLS, so no projector flatters them.

    Args:
        max_tiles: tiles kept for CKA and overlap.
    """

    def __init__(self, max_tiles: int) -> None:
        self.max_tiles = max_tiles
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []
        self._kept = 0

    def add_cosine(
        self, name: str, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> None:
        """Add tokens to the mean cosine called `name`."""
        value = torch.cosine_similarity(prediction.float(), target.float(), dim=-1)
        self._sums[name] = self._sums.get(name, value.new_zeros((), dtype=torch.float64)) + value.double().sum()
        self._counts[name] = self._counts.get(name, 0) + value.numel()

    def add_features(self, student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch other"]) -> None:
        """Keep CLS features of a batch, up to `max_tiles`."""
        room = self.max_tiles - self._kept
        if room > 0:
            self._student.append(student[:room].float().cpu())
            self._teacher.append(teacher[:room].float().cpu())
            self._kept += len(self._student[-1])

    def compute(self) -> dict[str, Tensor]:
        """All measures; CKA and overlap only where there are more tiles than neighbours."""
        values = {name: total / self._counts[name] for name, total in self._sums.items()}
        if self._kept > NEIGHBOURS + 1:
            student, teacher = torch.cat(self._student), torch.cat(self._teacher)
            values["cka"] = torch.as_tensor(linear_cka(student, teacher))
            values["knn_overlap"] = torch.as_tensor(knn_overlap(student, teacher, k=NEIGHBOURS))
        return {name: value.float() for name, value in values.items()}
