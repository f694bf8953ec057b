"""Several models on the same labelled, registered tiles: what they know, withstand and cost."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.cost.profile import ModelCost, profile_model
from pathokd.data.packed import PackedTiles
from pathokd.data.places import case_names, patient_names
from pathokd.embed import Embedder, Precision, embed_packed
from pathokd.errors import ManifestError
from pathokd.evaluate.bootstrap import FEW_GROUPS
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

    The probe leaves one patient out in turn (one case, where no column names patients) and pools the predictions: every
    tile is tested once, by a probe that never saw its patient. Tiles count if one class covers 60 % of them and it is
    not background; classes of a single patient are left out, as no probe could know them. Retrieval uses all tiles;
    where a case has several slides under one condition nobody knows which show the same tissue, and a warning says
    that retrieval is left out. Intervals resample patients, or places where there are fewer than 5.

    Args:
        models: Name to encoder, or to what `load_encoder` takes.
        packed_dir: Packed tiles whose index has the columns named here and `label_share`.
        label_column: The class of a tile.
        group_columns: Columns that together name the unit resampled for the probe's interval; None takes
            patients, or places.
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
    patients = patient_names(frame, case_names(frame, case_column))
    rows = probe_rows(frame, label_column, patients)
    places = place_ids(frame, case_column)
    if group_columns is None:
        units = _units(patients[rows], places[rows])
    else:
        units = frame[list(group_columns)].astype(str).agg("/".join, axis=1).to_numpy()[rows]
    try:
        across_scanners = registered_pairs(frame, vary=scanner, hold=stain, case_column=case_column)
        across_stains = registered_pairs(frame, vary=stain, hold=scanner, case_column=case_column)
    except ManifestError as error:
        warnings.warn(f"Retrieval across scanners and stainings is left out: {error}", stacklevel=2)
        across_scanners = across_stains = []
    labels, folds = frame[label_column].to_numpy(str)[rows], patients[rows]
    shown = _units(patients, places)
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
            probe=cross_probe(x[rows], labels, folds, units, seed),
            cross_scanner=score_retrieval(x, across_scanners, places, k, seed, units=shown),
            cross_staining=score_retrieval(x, across_stains, places, k, seed, units=shown),
        )
    return scores


def _units(patients: npt.NDArray[np.str_], places: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    """What intervals resample: places of a patient go up and down together, so patients if there are enough.

    As in `pathokd robustness`. By places, intervals of 24 cases held the truth in 1 of 2 studies instead of 19 of 20.
    """
    return patients if len(np.unique(patients)) >= FEW_GROUPS else places


def probe_rows(
    frame: pd.DataFrame, label_column: str = "label", patients: npt.NDArray[np.str_] | None = None
) -> npt.NDArray[np.int64]:
    """Rows fit for the probe: one class covers 60 %, it is tissue, and it occurs in at least two patients.

    Args:
        frame: Manifest or packed index.
        label_column: The class of a tile.
        patients: (n,) what is held out in turn; the column `case` by default.

    Returns:
        Row numbers.

    Raises:
        ManifestError: Fewer than two classes or two patients are left.
    """
    label = frame[label_column].astype(str)
    case = frame["case"].astype(str) if patients is None else pd.Series(patients, index=frame.index)
    keep = (frame["label_share"].to_numpy(np.float64) >= MIN_SHARE) & ~label.isin(NO_TISSUE).to_numpy()
    cases_of = case[keep].groupby(label[keep]).nunique()
    keep &= label.isin(cases_of.index[cases_of >= 2]).to_numpy()
    classes, cases = label[keep].nunique(), case[keep].nunique()
    if classes < 2 or cases < 2:
        raise ManifestError(
            "The probe holds out one patient (or case) at a time and needs two that share two classes; "
            f"{len(frame)} tiles leave {classes} classes in {cases} of them (one class on {MIN_SHARE:.0%} of a "
            "tile): add patients."
        )
    return np.flatnonzero(keep)
