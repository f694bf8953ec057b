"""Is the student still robust, epoch by epoch: cross-scanner top-k, separation and robustness index on a few pairs."""

import itertools
import sys
from typing import NamedTuple

import lightning as L
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback

from pathokd.data.packed import PackedTiles
from pathokd.data.places import registered_tiles
from pathokd.distill.module import DistillationModule
from pathokd.errors import ManifestError
from pathokd.metrics.conditions import compare_conditions
from pathokd.metrics.neighbours import typed_neighbours
from pathokd.metrics.robustness import indices, neighbour_counts
from pathokd.pictures import stack_planes

Rows = npt.NDArray[np.int64]


class PairedRows(NamedTuple):
    """Rows of a packed index that show the same places under every condition."""

    rows: dict[str, Rows]
    """Condition to (n,) rows; row i of all is one place."""
    pairs: list[tuple[str, str]]
    """Conditions of one staining and two scanners."""


class RobustnessCallback(Callback):
    """Measures the validated student on registered tiles after every validation epoch.

    Logs `val/top10_cross_scanner` (with its k in the name), `val/separation` and, where tiles have the column `label`,
    `val/robustness_index`; monitor one of them to choose the best checkpoint:
    `BestCheckpoint(folder, monitor="val/top10_cross_scanner")`. Training stops, with one sentence, once the separation
    falls below a threshold: the student then gives all tiles much the same features. Of several students it looks at
    the first.

    Args:
        tiles: Packed folder of registered tiles with the columns case, stain and scanner.
        max_places: Places used, drawn once by `seed`; a few hundred suffice and cost seconds.
        k: Nearest tiles that count as found.
        neighbour_k: k of the robustness index.
        min_separation: Below this the student counts as collapsed; 0 never stops. Lower it beside a teacher whose own
            is hardly more, as of class tokens that share a large mean.
        from_epoch: First epoch that may stop: a student that starts from random weights tells little apart at first.
        batch_size: Tiles per forward pass.
        seed: Of the choice of places.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        tiles: str,
        max_places: int = 256,
        k: int = 10,
        neighbour_k: int = 5,
        min_separation: float = 0.01,
        from_epoch: int = 1,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        for name, value in (("max_places", max_places - 1), ("k", k), ("neighbour_k", neighbour_k)):
            if value < 1:
                raise ValueError(f"{name} should be at least {2 if name == 'max_places' else 1}, got {value}.")
        self.tiles, self.max_places, self.k, self.neighbour_k = tiles, max_places, k, neighbour_k
        self.min_separation, self.from_epoch = min_separation, from_epoch
        self.batch_size, self.seed = batch_size, seed
        self.collapsed = False
        self._packed: PackedTiles | None = None
        self._paired: PairedRows | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the pairs, before anything is trained."""
        self._packed = PackedTiles(self.tiles)
        self._paired = cross_scanner_rows(self._packed.index, self.tiles, self.max_places, self.seed)
        n = len(next(iter(self._paired.rows.values())))
        if self.k > 2 * n - 1:
            raise ValueError(
                f"k = {self.k} is larger than the gallery of {2 * n - 1} tiles ({n} places in {self.tiles})."
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Embed the tiles with the evaluated student, log, and stop on collapse."""
        if trainer.sanity_checking or self._paired is None or not isinstance(pl_module, DistillationModule):
            return
        features = {name: self._embed(pl_module, rows) for name, rows in self._paired.rows.items()}
        values = self._measure(features)
        pl_module.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)
        separation = values["separation"]
        if separation < self.min_separation and trainer.current_epoch >= self.from_epoch:
            self.collapsed = trainer.should_stop = True
            if trainer.is_global_zero:
                print(  # noqa: T201
                    f"Training stops at epoch {trainer.current_epoch}: the student's separation is {separation:.4f}, "
                    f"below {self.min_separation:g}, so it gives all tiles much the same features; take "
                    "best.ckpt, and lower the weight of invariance terms or the learning rate.",
                    file=sys.stderr,
                    flush=True,
                )

    @torch.no_grad()
    def _embed(self, module: DistillationModule, rows: Rows) -> torch.Tensor:
        """Class tokens of the evaluated student, fp32 on its device."""
        if self._packed is None:
            raise RuntimeError("setup() has not run yet.")
        student, parts = module.evaluated, []
        for start in range(0, len(rows), self.batch_size):
            images = [self._packed.read(int(row)) for row in rows[start : start + self.batch_size]]
            tensor = torch.from_numpy(stack_planes(images)).to(module.device)
            parts.append(student(tensor).cls.float())
        return torch.cat(parts)

    def _measure(self, features: dict[str, torch.Tensor]) -> dict[str, float]:
        if self._paired is None or self._packed is None:
            raise RuntimeError("setup() has not run yet.")
        scores = list(compare_conditions(list(features), features.__getitem__, (self.k,), pairs=self._paired.pairs))
        values = {
            f"top{self.k}_cross_scanner": float(np.mean([score.topk[0] for score in scores])),
            "separation": float(np.mean([score.separation for score in scores])),
        }
        index = self._packed.index
        if "label" in index:
            found = robustness_index(features, self._paired, index, self.neighbour_k)
            if found is not None:
                values["robustness_index"] = found
        return values


def robustness_index(
    features: dict[str, torch.Tensor], paired: PairedRows, index: pd.DataFrame, k: int
) -> float | None:
    """Robustness index against the scanner, neighbours of the same case left out, stainings pooled.

    Args:
        features: By condition.
        paired: Rows of the conditions.
        index: The packed index, with the columns label, stain, scanner and case.
        k: Neighbours.

    Returns:
        The index, or None where labels and scanners do not allow it.
    """
    SO = OS = 0.0
    by_stain: dict[str, list[str]] = {}
    for name, rows in paired.rows.items():
        by_stain.setdefault(str(index["stain"].iloc[rows[0]]), []).append(name)
    for names in by_stain.values():
        rows = np.concatenate([paired.rows[name] for name in names])
        x = torch.cat([features[name] for name in names])
        table = index[["label", "scanner", "case"]].iloc[rows].astype(str)
        kept = (table.groupby("label")["scanner"].transform("nunique") >= 2).to_numpy() & (
            table["label"] != ""
        ).to_numpy()
        table, x = table[kept], x[torch.from_numpy(np.flatnonzero(kept)).to(x.device)]
        try:
            label, scanner, case = (table[name].to_numpy(str) for name in table)
            counts = neighbour_counts(typed_neighbours(x, label, scanner, case, k), k)
        except ValueError:  # one class, or too few tiles of other cases: nothing to say
            continue
        if indices(counts).support > 0:
            SO, OS = SO + float(counts.SO.sum()), OS + float(counts.OS.sum())
    return SO / (SO + OS) if SO + OS > 0 else None


def cross_scanner_rows(index: pd.DataFrame, source: str, max_places: int, seed: int = 0) -> PairedRows:
    """Places seen under every condition of the index, and the pairs of conditions that differ in the scanner only.

    Args:
        index: Packed index.
        source: Its folder, for messages.
        max_places: At most so many places.
        seed: Of the choice.

    Returns:
        Rows and pairs.

    Raises:
        ManifestError: A column is missing, no staining was scanned twice, or fewer than two places are complete.
    """
    missing = [name for name in ("case", "stain", "scanner") if name not in index]
    if missing:
        raise ManifestError(
            f"{source} lacks the columns {', '.join(missing)}, so its tiles cannot be paired; make pairs with "
            "`pathokd simulate` or from registered slides."
        )
    names = (index["stain"].astype(str) + "_" + index["scanner"].astype(str)).to_numpy(str)
    known = {name: str(stain) for name, stain in zip(names, index["stain"], strict=True)}
    pairs = [(a, b) for a, b in itertools.combinations(known, 2) if known[a] == known[b]]
    if not pairs:
        raise ManifestError(
            f"{source} shows no staining under two scanners, so nothing can be found again across them."
        )
    place = registered_tiles(index.reset_index(drop=True)).place
    table = pd.DataFrame({"place": place, "name": names, "row": np.arange(len(index))})[place >= 0]
    wide = table.pivot_table(index="place", columns="name", values="row")
    complete = wide.dropna()
    if len(complete) < 2:
        raise ManifestError(
            f"{source}: {len(complete)} places are seen under all {len(known)} conditions, two are needed."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(complete))[:max_places])
    rows = {name: complete[name].to_numpy(np.int64)[chosen] for name in known}
    return PairedRows(rows, pairs)
