"""Which tiles come when: a pure function of seed, epoch and position, so that any step can be returned to."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from pathokd.data.batch import Draw
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
            yield [Draw(int(row), self.epoch) for row in self._rows(order, batch)]

    def _rows(self, order: IntArray, batch: int) -> IntArray:
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
        for name in ("n", "batch_size", "seed", "world_size"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"Cannot resume in mid-epoch: the checkpoint was written with {name}={state[name]}, this run has "
                    f"{name}={mine[name]}; resume with the same data settings and number of processes."
                )
        self.epoch, self.done = state["epoch"], state["done"]
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
