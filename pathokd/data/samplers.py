"""Which tiles come when: a pure function of seed, epoch and position, so that any step can be returned to."""

import itertools
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from pathokd.data.batch import Draw
from pathokd.data.places import Registered
from pathokd.errors import ManifestError
from pathokd.types import IntArray


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool = True) -> IntArray:
    """Order in which `n` tiles are visited in `epoch`: a permutation that depends on seed and epoch only."""
    if not shuffle:
        return np.arange(n)
    return np.random.default_rng([seed, epoch]).permutation(n)


class ResumableBatchSampler(Sampler[list[Draw]]):
    """Batches of draws that know their place, across epochs, ranks and restarts.

    Every rank sees the same number of full batches: tiles that do not fill a batch on all ranks are left out of this
    epoch (another permutation leaves out others). With `drop_last=False` each tile comes exactly once, on one rank: the
    last batch may be short, and on several ranks, which need equally many batches, a few may hold a tile more or less.

    Args:
        n: number of tiles.
        batch_size: tiles per rank and batch.
        seed: decides every order.
        shuffle: permute anew each epoch.
        drop_last: leave out the tiles that fill no batch.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}.")
        if not drop_last and n < world_size:
            raise ValueError(f"drop_last=False needs a tile for each of the {world_size} processes, got {n}.")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.epoch = 0
        self.done = 0
        # Lightning looks for `batch_sampler.sampler.set_epoch`.
        self.sampler = self

    def __len__(self) -> int:
        """Batches in a whole epoch on this rank, however many of them are already done."""
        per_step = self.batch_size * self.world_size
        if self.drop_last:
            return self.n // per_step
        fewest = self.n // self.world_size  # tiles on a rank, and so the most batches that all ranks can fill
        return min(-(-self.n // per_step), fewest) if self.world_size > 1 else -(-self.n // per_step)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of the current epoch that are not done yet."""
        order = epoch_order(self.n, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        for batch in range(self.done, len(self)):
            yield [Draw(int(row), self.epoch) for row in self._mine(order, batch)]

    def _mine(self, order: IntArray, batch: int) -> IntArray:
        step = self.batch_size * self.world_size
        if self.drop_last or self.world_size == 1:
            return order[batch * step : (batch + 1) * step][self.rank :: self.world_size]
        mine, count = order[self.rank :: self.world_size], len(self)
        return mine[batch * len(mine) // count : (batch + 1) * len(mine) // count]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; does nothing when already inside it (a resumed run)."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where this sampler stands, and what its order depends on."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "n": self.n,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go where `state` stood.

        Raises:
            ValueError: the order would be another one; names the setting that differs.
        """
        mine = self.state_dict()
        for name in {**mine, **state}:
            if name not in ("epoch", "done") and state.get(name) != mine.get(name):
                raise ValueError(
                    f"Cannot resume in mid-epoch: the checkpoint was written with {name}={state.get(name)}, this run "
                    f"has {name}={mine.get(name)}; resume with the same data settings and number of processes."
                )
        self.epoch, self.done = state["epoch"], state["done"]
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0


class PlaceBatchSampler(ResumableBatchSampler):
    """Batches of places, each seen under the same two conditions, as `RegisteredInfoNCE` wants them.

    A batch draws two conditions, more often those that share more places, and half as many of their places as it has
    tiles. It depends on seed, epoch and its number alone. An epoch is as many batches as the places would fill once;
    since batches are drawn anew each, it misses some places and sees others twice, never by the same views.

    Args:
        registered: places and conditions of the tiles drawn from; those of place -1 never come.
        batch_size: tiles per rank and batch, even and at least 4: two places are needed for a negative.
        seed: decides every batch.
        rank: this process; processes share the conditions of a batch and have other places.
        world_size: number of processes.

    Raises:
        ManifestError: no two conditions share enough places for a batch.
    """

    def __init__(
        self, registered: Registered, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % 2 or batch_size < 4:
            raise ValueError(
                f"batch_size must be even and at least 4 for registered pairs, got {batch_size}: each place comes "
                "under two conditions, and its negatives are other places."
            )
        super().__init__(len(registered.place), batch_size, seed=seed, rank=rank, world_size=world_size)
        rows = np.flatnonzero(registered.place >= 0)
        place, condition = registered.place[rows], registered.condition[rows]
        self._rows = np.full((place.max(initial=-1) + 1, condition.max(initial=-1) + 1), -1)
        self._rows[place, condition] = rows
        answers_to = b"" if registered.answers_to is None else registered.answers_to.tobytes()
        self._identity = zlib.crc32(self._rows.tobytes() + answers_to)
        self._places = batch_size // 2 * world_size
        seen = (self._rows >= 0).astype(np.int64)
        shared = seen.T @ seen
        pairs = itertools.combinations(range(len(shared)), 2)
        self._pairs = [(a, b) for a, b in pairs if shared[a, b] >= self._places]
        if not self._pairs:
            most = max((int(shared[a, b]) for a, b in itertools.combinations(range(len(shared)), 2)), default=0)
            raise ManifestError(
                f"A batch of {batch_size} registered tiles on {world_size} process(es) needs {self._places} places "
                f"under the same two conditions, and no two conditions share more than {most}: lower "
                "data.batch_size, or add registered slides."
            )
        comes = np.zeros_like(seen)
        for a, b in self._pairs:
            comes[:, [a, b]] |= (seen[:, a] & seen[:, b])[:, None]
        never = int(seen.sum() - comes.sum())
        if never and rank == 0:
            warnings.warn(
                f"{never} of the {len(rows)} registered tiles never come: their conditions share fewer than the "
                f"{self._places} places of a batch with any other; lower data.batch_size to see them.",
                stacklevel=2,
            )
        counts = np.array([shared[pair] for pair in self._pairs], np.float64)
        self._chances = counts / counts.sum()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return max(1, int((self._rows >= 0).any(1).sum()) // self._places)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of the current epoch that are not done yet."""
        for batch in range(self.done, len(self)):
            visit = self.epoch * len(self) + batch
            rng = np.random.default_rng([self.seed, visit])
            a, b = self._pairs[rng.choice(len(self._pairs), p=self._chances)]
            both = np.flatnonzero((self._rows[:, a] >= 0) & (self._rows[:, b] >= 0))
            mine = rng.permutation(both)[: self._places][self.rank :: self.world_size]
            yield [Draw(int(row), visit) for condition in (a, b) for row in self._rows[mine, condition]]

    def state_dict(self) -> dict[str, int]:
        """Where this sampler stands, and which pairs and targets its batches depend on."""
        return {**super().state_dict(), "registered": self._identity}
