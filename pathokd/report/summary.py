"""The comparison as JSON, with flat keys that a program can check."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathokd.evaluate import Fidelity, ModelScores, RetrievalScore
from pathokd.files import write_json

DIGITS = 5


def comparison_summary(scores: Mapping[str, ModelScores], fidelity: Fidelity | None = None) -> dict[str, Any]:
    """Numbers of a comparison by model (`teacher`, `student`, `control`), and `fidelity`.

    Args:
        scores: From `compare_models`; its names become the keys.
        fidelity: From `measure_fidelity`.

    Returns:
        JSON-able; what was not measured is None.
    """
    summary: dict[str, Any] = {name: _model(score) for name, score in scores.items()}
    if fidelity is not None:
        summary["fidelity"] = {key: _round(value) for key, value in fidelity._asdict().items()}
    return summary


def write_summary(
    path: str | Path,
    scores: Mapping[str, ModelScores],
    fidelity: Fidelity | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `comparison_summary` as JSON, atomically.

    Args:
        path: The file.
        scores: From `compare_models`.
        fidelity: From `measure_fidelity`.
        extra: Further top-level keys, such as `seconds`.

    Returns:
        What was written.

    Raises:
        StoreError: The file cannot be written.
    """
    summary = {**comparison_summary(scores, fidelity), **(extra or {})}
    write_json(path, summary)
    return summary


def _model(score: ModelScores) -> dict[str, Any]:
    probe = score.probe
    return {
        "params": score.cost.params,
        "gflops": _round(score.cost.gflops),
        "tiles_per_s": _round(score.cost.tiles_per_s),
        "readout": score.readout,
        "probe_accuracy": _round(probe.accuracy),
        "probe_ci": [_round(bound) for bound in probe.ci],
        "probe_knn10": _round(probe.knn10_accuracy),
        "probe_knn10_ci": [_round(bound) for bound in probe.knn10_ci],
        "probe_n": probe.n,
        "probe_groups": probe.n_groups,
        "probe_classes": probe.n_classes,
        **_retrieval(score.cross_scanner, "cross_scanner"),
        **_retrieval(score.cross_staining, "cross_staining"),
    }


def _retrieval(score: RetrievalScore | None, name: str) -> dict[str, Any]:
    topk = f"top{score.k if score else 10}_{name}"
    if score is None:
        return {topk: None}
    return {
        topk: _round(score.topk),
        f"{topk}_ci": [_round(bound) for bound in score.ci],
        f"{name}_n_tiles": score.n_tiles,
        f"{name}_n_pairs": score.n_pairs,
        f"{name}_chance": _round(score.chance),
        f"{name}_cosine": _round(score.cosine),
        f"{name}_separation": _round(score.separation),
        f"{name}_tied": _round(score.tied),
    }


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, DIGITS) if math.isfinite(value) else None
