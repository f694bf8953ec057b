"""What a validation measures of the student, teacher by teacher."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from pathokd.data.views import CLEAN
from pathokd.distill.batch_features import TargetCache, project
from pathokd.distill.fidelity import Fidelity
from pathokd.distill.network import ProjectedStudent
from pathokd.distill.objective import Tokens
from pathokd.distill.prototypes import Agreement
from pathokd.models.features import Features


class Validation:
    """A student against every teacher on clean tiles, accumulated over batches.

    Args:
        teachers: their keys, the first one's measures go without its name.
        aligned: (teacher, tokens) of each projector.
        agreement: by (teacher, tokens), where assignments to prototypes are compared.
        tiles: how many are kept for CKA and k-NN overlap.
    """

    def __init__(
        self,
        teachers: Iterable[str],
        aligned: Iterable[tuple[str, Tokens]],
        agreement: Mapping[tuple[str, Tokens], Agreement],
        tiles: int,
    ) -> None:
        self._fidelity = {key: Fidelity(tiles) for key in teachers}
        self._aligned, self._agreement = list(aligned), agreement

    def add(self, net: ProjectedStudent, images: Tensor, targets: TargetCache) -> None:
        """Add a batch.

        Args:
            net: the student that is evaluated.
            images: clean views, (batch, 3, height, width).
            targets: of the same tiles.
        """
        student: Features = net(images)
        for key, tokens in self._aligned:
            target = targets.get(key, tokens, CLEAN, student.grid)
            self._fidelity[key].add_cosine(f"cosine_{tokens}", project(net, student, key, tokens, targets), target)
        for (key, tokens), agreement in self._agreement.items():
            head = net.dino_head(key, tokens)
            unit = targets.unit(key, tokens, CLEAN, student.grid)
            agreement.add(head(getattr(student, tokens)), head.prototypes(), unit)
        for key, fidelity in self._fidelity.items():
            fidelity.add_features(student.cls, targets.features(key, CLEAN).cls)

    def compute(self, stage: str) -> list[dict[str, Tensor]]:
        """Measures of each teacher as `STAGE/cosine_cls` or `STAGE/TEACHER/cosine_cls`; every process must ask."""
        found = []
        for number, (key, fidelity) in enumerate(self._fidelity.items()):
            measures = fidelity.compute()
            for (teacher, tokens), agreement in self._agreement.items():
                if teacher == key:
                    measures.update(agreement.compute(tokens))
            prefix = stage if number == 0 else f"{stage}/{key}"
            found.append({f"{prefix}/{name}": value for name, value in measures.items()})
        return found
