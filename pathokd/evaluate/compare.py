"""Several models on the same labelled, registered tiles: what they know, withstand and cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.cost.profile import ModelCost, profile_model
from pathokd.data.packed import PackedTiles
from pathokd.data.places import case_names
from pathokd.embed import Embedder, Precision, embed_packed
from pathokd.errors import ManifestError
from pathokd.evaluate.paired_set import MIN_CASES
from pathokd.evaluate.pairs import place_ids, registered_pairs, require_columns
from pathokd.evaluate.probes import ProbeResult, cross_probe
from pathokd.evaluate.retrieval import RetrievalScore, score_retrieval
from pathokd.models import Encoder, Readout

MIN_SHARE = 0.6
"""Tiles are probed if at least this share of them is of one class."""
NO_TISSUE = ("", "background")
"""Labels that are not probed."""


class ModelScores(NamedTuple):
    """One model's row in a comparison."""

    name: str
    readout: Readout
    cost: ModelCost
    probe: ProbeResult
    cross_scanner: RetrievalScore | None
    """Same staining, two scanners; None if no staining was scanned twice."""
    cross_staining: RetrievalScore | None
    """Same scanner, two stainings; None if no scanner saw two."""


def compare_models(
    models: Mapping[str, str | Encoder],
    packed_dir: str | Path | PackedTiles,
    *,
    label_column: str = "label",
    group_columns: tuple[str, ...] | None = None,
    condition_columns: tuple[str, str] = ("stain", "scanner"),
    case_column: str = "case",
    readout: Readout = "cls",
    batch_size: int = 32,
    workers: int = 2,
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
    k: int = 10,
    cost_seconds: float = 2.0,
) -> dict[str, ModelScores]:
    """Score models on packed tiles of registered, labelled slides.

    The probe leaves one case out in turn and pools the predictions: every tile is tested once, by a probe
    that never saw its case. Tiles count if one class covers 60 % of them and it is not background; classes
    that occur in a single case are left out, as no probe could know them. Retrieval uses all tiles.
    Intervals resample cases, or places where there are fewer than 8 cases.

    Args:
        models: Name to encoder, or to what `load_encoder` takes.
        packed_dir: Packed tiles whose index has the columns named here and `label_share`.
        label_column: The class of a tile.
        group_columns: Columns that together name the unit resampled for the probe's interval; None takes
            cases, or places.
        condition_columns: Staining and scanner.
        case_column: Slides of one case are registered with each other.
        readout: How tokens become one vector, the same for all models.
        batch_size: Tiles per forward pass.
        workers: Threads that read ahead.
        precision: Arithmetic of the forward pass.
        device: `auto` or a torch device.
        seed: Of folds and resampling.
        k: Nearest tiles that count as found.
        cost_seconds: Time spent measuring each model's speed.

    Returns:
        Scores by name, in the order given.

    Raises:
        ManifestError: A column is missing, or labels leave nothing to probe.
    """
    packed = packed_dir if isinstance(packed_dir, PackedTiles) else PackedTiles(packed_dir)
    frame = packed.index
    stain, scanner = condition_columns
    require_columns(frame, (label_column, "label_share", stain, scanner, case_column, *(group_columns or ())))
    rows = probe_rows(frame, label_column, case_column)
    places = place_ids(frame, case_column)
    if group_columns is None:
        units = _units(frame, case_column, places, rows)
    else:
        units = frame[list(group_columns)].astype(str).agg("/".join, axis=1).to_numpy()[rows]
    across_scanners = registered_pairs(frame, vary=scanner, hold=stain, case_column=case_column)
    across_stains = registered_pairs(frame, vary=stain, hold=scanner, case_column=case_column)
    labels, cases = frame[label_column].to_numpy(str)[rows], frame[case_column].to_numpy(str)[rows]
    shown = _units(frame, case_column, places, np.arange(len(frame)))
    scores = {}
    for name, model in models.items():
        embedder = Embedder(model, readout, precision, device, batch_size)
        if not isinstance(embedder.encoder, Encoder):
            raise ValueError(
                f"compare also measures what a vision transformer costs, and {name} is a network from elsewhere: "
                "measure it with `pathokd robustness`."
            )
        x = embed_packed(embedder, packed, workers=workers, title=f"Embedding with {name}").features
        scores[name] = ModelScores(
            name=name,
            readout=readout,
            cost=profile_model(embedder.encoder, batch_size=min(batch_size, 8), seconds=cost_seconds),
            probe=cross_probe(x[rows], labels, cases, units, seed),
            cross_scanner=score_retrieval(x, across_scanners, places, k, seed, units=shown),
            cross_staining=score_retrieval(x, across_stains, places, k, seed, units=shown),
        )
    return scores


def _units(
    frame: pd.DataFrame, case_column: str, places: npt.NDArray[np.str_], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.str_]:
    """What intervals resample, for some rows: places of a case go up and down together, so cases if there are enough.

    As in `pathokd robustness`. By places, intervals of 24 cases held the truth in 1 of 2 studies instead of 19 of 20.
    """
    cases = case_names(frame, case_column)[rows]
    return cases if len(np.unique(cases)) >= MIN_CASES else places[rows]


def probe_rows(frame: pd.DataFrame, label_column: str = "label", case_column: str = "case") -> npt.NDArray[np.int64]:
    """Rows fit for the probe: one class covers 60 %, it is tissue, and it occurs in at least two cases.

    Args:
        frame: Manifest or packed index.
        label_column: The class of a tile.
        case_column: What is held out in turn.

    Returns:
        Row numbers.

    Raises:
        ManifestError: Fewer than two classes or two cases are left.
    """
    label, case = frame[label_column].astype(str), frame[case_column].astype(str)
    keep = (frame["label_share"].to_numpy(np.float64) >= MIN_SHARE) & ~label.isin(NO_TISSUE).to_numpy()
    cases_of = case[keep].groupby(label[keep]).nunique()
    keep &= label.isin(cases_of.index[cases_of >= 2]).to_numpy()
    classes, cases = label[keep].nunique(), case[keep].nunique()
    if classes < 2 or cases < 2:
        raise ManifestError(
            "The probe holds out one case at a time and needs two cases that share two classes; "
            f"{len(frame)} tiles leave {classes} classes in {cases} cases (one class on {MIN_SHARE:.0%} of a "
            "tile): add cases."
        )
    return np.flatnonzero(keep)
