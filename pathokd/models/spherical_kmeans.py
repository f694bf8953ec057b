"""Spherical k-means over more vectors than fit in memory: blocks in, unit centroids out."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""Cosines held at a time, 32 MiB."""
SEEDING_ROUNDS = 256
"""Up to so many centroids are seeded one by one; more are drawn in as many rounds."""

Labels = npt.NDArray[np.int32]
Blocks = Callable[[], Iterable[Float[Tensor, "rows dim"]]]
"""Gives the unit vectors block by block, in the same order each time it is called."""


class Clusters(NamedTuple):
    """Centroids and what they were when each vector was last assigned.

    centroids: (K, dim) unit vectors. counts: (K,) vectors nearest to each. similarity: mean cosine of a vector to
    its nearest centroid, of the centroids *before* this step moved them.
    """

    centroids: Float[Tensor, "count dim"]
    counts: Tensor
    similarity: float


def seed_centroids(sample: Float[Tensor, "rows dim"], count: int, rng: np.random.Generator) -> Tensor:
    """k-means++: centroids drawn far apart, each with odds proportional to 1 - cosine to the nearest drawn so far.

    Beyond 256 centroids several are drawn at once, so that it costs one pass over `sample` however many there are.

    Args:
        sample: unit vectors, more than `count`.
        count: K.
        rng: of the draws.

    Returns:
        Shape (count, dim), rows of `sample`, all at different places.

    Raises:
        ValueError: fewer vectors than centroids.

    Reference:
        Arthur & Vassilvitskii 2007, "k-means++"; Bahmani et al. 2012, "Scalable k-means++", for drawing in rounds.
    """
    if len(sample) < count:
        raise ValueError(f"{count} centroids need as many vectors, got {len(sample)}: add tiles or lower --k.")
    chosen = [int(rng.integers(len(sample)))]
    gap = np.full(len(sample), np.inf)
    new = chosen
    per_round = -(-count // SEEDING_ROUNDS)
    while True:
        near = torch.cat([_best(part, sample[new])[0] for part in torch.split(sample, _rows(len(new)))])
        gap = np.minimum(gap, (1 - near.double()).clamp(min=0).cpu().numpy())
        gap[new] = 0
        if len(chosen) == count:
            return sample[chosen].clone()
        want = min(per_round, count - len(chosen))
        odds = gap if np.count_nonzero(gap) >= want else np.where(np.isin(np.arange(len(gap)), chosen), 0.0, 1.0)
        new = [int(i) for i in rng.choice(len(sample), want, replace=False, p=odds / odds.sum())]
        chosen = chosen + new


def lloyd_step(blocks: Blocks, centroids: Float[Tensor, "count dim"], rng: np.random.Generator) -> Clusters:
    """Assign every vector to the nearest centroid by cosine and move each centroid to the mean direction of its own.

    A centroid that nobody is nearest to takes the place of a random vector of the largest cluster, so that K stay K.
    Sums are fp64, so that the order of additions hardly matters (on CUDA it is not fixed).

    Args:
        blocks: the vectors.
        centroids: unit vectors, on the blocks' device.
        rng: for the places of empty clusters.
    """
    k, dim = centroids.shape
    sums = torch.zeros(k, dim, dtype=torch.float64, device=centroids.device)
    counts = torch.zeros(k, dtype=torch.int64, device=centroids.device)
    total, labels = torch.zeros((), dtype=torch.float64, device=centroids.device), []
    for block in blocks():
        for part in torch.split(block, _rows(k)):
            best, nearest = _best(part, centroids)
            sums.index_add_(0, nearest, part.double())
            counts += torch.bincount(nearest, minlength=k)
            total += best.double().sum()
            labels.append(nearest.to(torch.int32).cpu())
    moved = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1).float(), centroids)
    owner = torch.cat(labels).numpy()
    refilled = refill(counts.cpu().numpy(), owner, rng)
    if refilled:
        moved[list(refilled)] = _pick(blocks, np.array(list(refilled.values()))).to(moved.dtype)
    return Clusters(moved, counts, float(total / len(owner)))


def refill(counts: npt.NDArray[np.int64], owner: Labels, rng: np.random.Generator) -> dict[int, int]:
    """For each empty cluster a random member of the then largest one; each takes half of what it counts.

    Where a few clusters hold everything there may be too few members to go round: the rest stay empty.
    """
    left, taken = counts.astype(float), {}
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return {}
    order = np.argsort(owner, kind="stable")
    start = np.concatenate([[0], np.cumsum(counts)])
    used: set[int] = set()
    for cluster in empty:
        largest = int(left.argmax())
        if not left[largest]:
            break
        members = order[start[largest] : start[largest + 1]]
        member = int(members[rng.integers(len(members))])
        left[largest] = 0 if member in used else left[largest] / 2
        if member not in used:
            taken[int(cluster)] = member
            used.add(member)
    return taken


def _pick(blocks: Blocks, rows: npt.NDArray[np.int64]) -> Tensor:
    """Some vectors by their number, in the order asked for."""
    found: dict[int, Tensor] = {}
    start = 0
    for block in blocks():
        for row in rows[(rows >= start) & (rows < start + len(block))]:
            found[int(row)] = block[int(row) - start]
        start += len(block)
    return torch.stack([found[int(row)] for row in rows])


def _rows(count: int) -> int:
    return max(1, CHUNK_ELEMENTS // count)


def _best(part: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each row and whose it is."""
    best = (part @ centroids.T).max(dim=1)
    return best.values, best.indices
