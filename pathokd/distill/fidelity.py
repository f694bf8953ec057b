"""How much of a teacher a student holds, accumulated over validation batches."""

import torch
from jaxtyping import Float
from torch import Tensor

from pathokd.metrics.retrieval import knn_overlap
from pathokd.metrics.similarity import linear_cka
from pathokd.processes import gather_objects, process_rank, world_size

NEIGHBOURS = 10


class Fidelity:
    """Cosine (CLS, patches), linear CKA and k-NN overlap between projected student and teacher.

    Cosines are means over all tokens seen. CKA and overlap need the features themselves, of which the first `max_tiles`
    are kept; they compare the student's own CLS, so no projector flatters them. Where several processes see a share of
    the tiles each, sums and features are put together before anything is divided.

    Args:
        max_tiles: tiles kept for CKA and overlap, of all processes together.
    """

    def __init__(self, max_tiles: int) -> None:
        self.max_tiles = max_tiles
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []
        self._kept = 0
        # Process r of w sees the tiles r, r + w, ..., so that these are the first `max_tiles` of all.
        self._room = -(-(max_tiles - process_rank()) // world_size())

    def add_cosine(
        self, name: str, prediction: Float[Tensor, "*tokens dim"], target: Float[Tensor, "*tokens dim"]
    ) -> None:
        """Add tokens to the mean cosine called `name`."""
        value = torch.cosine_similarity(prediction.float(), target.float(), dim=-1)
        self._sums[name] = self._sums.get(name, value.new_zeros((), dtype=torch.float64)) + value.double().sum()
        self._counts[name] = self._counts.get(name, 0) + value.numel()

    def add_features(self, student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch other"]) -> None:
        """Keep CLS features of a batch, up to `max_tiles`."""
        room = self._room - self._kept
        if room > 0:
            self._student.append(student[:room].float().cpu())
            self._teacher.append(teacher[:room].float().cpu())
            self._kept += len(self._student[-1])

    def compute(self) -> dict[str, Tensor]:
        """All measures; CKA and overlap only where there are more tiles than neighbours. Every process must call it."""
        sums = {name: (total.cpu(), self._counts[name]) for name, total in self._sums.items()}
        parts = gather_objects((sums, self._student, self._teacher))
        values = {
            name: torch.stack([part[0][name][0] for part in parts]).sum() / sum(part[0][name][1] for part in parts)
            for name in sums
        }
        students, teachers = [x for part in parts for x in part[1]], [x for part in parts for x in part[2]]
        if sum(map(len, students)) > NEIGHBOURS + 1:
            student, teacher = torch.cat(students), torch.cat(teachers)
            values["cka"] = torch.as_tensor(linear_cka(student, teacher))
            values["knn_overlap"] = torch.as_tensor(knn_overlap(student, teacher, k=NEIGHBOURS))
        return {name: value.float() for name, value in values.items()}
