"""A comparison as a table: models as columns, one line per question, n and interval beside each number."""

from collections.abc import Callable, Mapping

from pathokd.evaluate import Fidelity, ModelScores, RetrievalScore
from pathokd.evaluate.bootstrap import FEW_GROUPS, Interval
from pathokd.report.terminal import ModelTable

Line = tuple[str, Callable[[ModelScores], str]]


def comparison_table(scores: Mapping[str, ModelScores], title: str = "") -> ModelTable:
    """The comparison for a terminal.

    Args:
        scores: From `compare_models`.
        title: Above the table.

    Returns:
        What rich prints.
    """
    return ModelTable(list(scores), _rows(scores), _caption(scores), title)


def comparison_markdown(scores: Mapping[str, ModelScores]) -> str:
    """The same comparison as a Markdown table, for cards and notes.

    Args:
        scores: From `compare_models`.

    Returns:
        Lines of Markdown, the caption as the last paragraph.
    """
    names = [name.replace("|", r"\|") for name in scores]
    head = ["| |" + "".join(f" {name} |" for name in names), "|---|" + "--:|" * len(scores)]
    body = ["| " + " | ".join([label, *cells]) + " |" for label, cells in _rows(scores)]
    return "\n".join([*head, *body, "", _caption(scores), ""])


def fidelity_sentence(fidelity: Fidelity) -> str:
    """What a student holds of its teacher, in one sentence.

    Args:
        fidelity: From `measure_fidelity`.

    Returns:
        One sentence with n.
    """
    parts = [
        f"cosine {name} {value:.3f}"
        for name, value in (("CLS", fidelity.cosine_cls), ("patches", fidelity.cosine_patches))
        if value is not None
    ]
    parts += [f"linear CKA {fidelity.cka:.3f}", f"10-NN overlap {fidelity.knn_overlap:.3f}"]
    return f"Student to teacher on {fidelity.n:,} tiles: {', '.join(parts)}."


def _rows(scores: Mapping[str, ModelScores]) -> list[tuple[str, list[str]]]:
    lines: list[Line] = [
        ("parameters", lambda s: f"{s.cost.params / 1e6:.2f} M"),
        ("GFLOP per tile", lambda s: f"{s.cost.gflops:.2f}"),
        ("tiles per second", lambda s: f"{s.cost.tiles_per_s:.1f}"),
        ("linear probe", lambda s: _number(s.probe.accuracy, s.probe.ci)),
        ("10-NN", lambda s: _number(s.probe.knn10_accuracy, s.probe.knn10_ci)),
    ]
    for name, pick in _CONDITIONS:
        if any(pick(score) for score in scores.values()):
            lines.append((f"top-{_k(scores, pick)} across {name}", _topk_cell(pick)))
            lines.append((f"separation across {name}", _separation_cell(pick)))
    return [(label, [cell(score) for score in scores.values()]) for label, cell in lines]


Pick = Callable[[ModelScores], RetrievalScore | None]
_CONDITIONS: tuple[tuple[str, Pick], ...] = (
    ("scanners", lambda s: s.cross_scanner),
    ("stainings", lambda s: s.cross_staining),
)


def _k(scores: Mapping[str, ModelScores], pick: Pick) -> int:
    return next(found.k for score in scores.values() if (found := pick(score)))


def _topk_cell(pick: Pick) -> Callable[[ModelScores], str]:
    def cell(score: ModelScores) -> str:
        found = pick(score)
        return _number(found.topk, found.ci) if found else "-"

    return cell


def _separation_cell(pick: Pick) -> Callable[[ModelScores], str]:
    def cell(score: ModelScores) -> str:
        found = pick(score)
        return f"{found.separation:.3f}" if found else "-"

    return cell


def _number(value: float, interval: Interval) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _caption(scores: Mapping[str, ModelScores]) -> str:
    """n of everything; it is the same for all models, as they saw the same tiles."""
    first = next(iter(scores.values()), None)
    if first is None:
        return ""
    probe = first.probe
    few = ", which are too few for them" if probe.n_groups < FEW_GROUPS else ""
    text = (
        f"Balanced accuracy of {probe.n_classes} classes on {probe.n:,} held-out tiles of {probe.n_groups:,} "
        f"groups, 95 % intervals by resampling groups{few}; readout {first.readout}."
    )
    for name, pick in _CONDITIONS:
        found = pick(first)
        if found:
            text += (
                f" Across {name}: {found.n_pairs} pair{'s' * (found.n_pairs > 1)} of {found.n_tiles:,} tiles "
                f"each, chance {found.chance:.3f}."
            )
    return text
