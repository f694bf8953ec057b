"""`pathokd compare`: models side by side on registered, labelled tiles, or on labelled images."""

from collections.abc import Iterable
from typing import Literal

from pathokd.cli.named import named_models
from pathokd.files import check_file


def compare(
    models: list[str],
    *,
    data: str,
    out: str | None = None,
    readout: Literal["cls", "mean", "cls+mean"] = "cls",
    seed: int = 0,
    fidelity: str | None = None,
) -> int:
    """Compare models.

    Args:
        models: NAME=MODEL each, where MODEL is an exported folder, a card's name or hf-hub:OWNER/NAME.
        data: Packed tiles of registered, labelled slides (columns label, case, stain, scanner); or an .npz of labelled
            images (images, labels), on which only a probe is run.
        out: JSON file for the numbers.
        readout: How tokens become one vector, the same for all models.
        seed: Of folds and resampling.
        fidelity: STUDENT:TEACHER, two of the names: also measure how much of the teacher the student holds.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    named = named_models(models)
    if fidelity and data.endswith(".npz"):
        raise ValueError("--fidelity compares on packed tiles: give these as --data, or leave it out.")
    if fidelity and (fidelity.count(":") != 1 or not {*fidelity.split(":")} <= named.keys()):
        raise ValueError(f"--fidelity takes STUDENT:TEACHER out of {', '.join(named)}, got {fidelity!r}.")
    if out:
        check_file(out, "comparison.json")
    if data.endswith(".npz"):
        return _compare_images(named, data, out, readout, seed)
    from rich.console import Console

    from pathokd.data.packed import PackedTiles
    from pathokd.embed.embedder import Embedder
    from pathokd.evaluate import compare_models, measure_fidelity
    from pathokd.export import load_adaptors
    from pathokd.report import comparison_table, fidelity_sentence, write_summary

    tiles = PackedTiles(data)
    scores = compare_models(named, tiles, readout=readout, seed=seed)
    console = Console()
    console.print(comparison_table(scores))
    held = None
    if fidelity:
        student, teacher = fidelity.split(":")
        heads = load_adaptors(named[student])
        held = measure_fidelity(
            Embedder(named[teacher]), Embedder(named[student]), heads, tiles, key=_head_of(teacher, heads)
        )
        console.print(fidelity_sentence(held), markup=False)
    if out:
        write_summary(out, scores, held)
    return 0


def _head_of(teacher: str, heads: Iterable[str]) -> str | None:
    """Which of a student's heads leads to a teacher: the only one, or that of the teacher's name."""
    keys = dict.fromkeys(name.split(".")[0] for name in heads)
    if len(keys) > 1 and teacher not in keys:
        raise ValueError(
            f"--fidelity: the student has heads for the teachers {', '.join(keys)}; call the teacher by one of these "
            f"names, NAME=MODEL, got {teacher!r}."
        )
    return teacher if teacher in keys else next(iter(keys), None)


def _compare_images(
    models: dict[str, str], data: str, out: str | None, readout: Literal["cls", "mean", "cls+mean"], seed: int
) -> int:
    from pathokd.evaluate import probe_images
    from pathokd.files import write_json

    results = {}
    for name, model in models.items():
        probe = probe_images(model, data, readout=readout, seed=seed)
        results[name] = probe._asdict()
        print(
            f"{name}: linear probe {probe.accuracy:.3f} ({probe.ci[0]:.3f} to {probe.ci[1]:.3f}), "
            f"10-NN {probe.knn10_accuracy:.3f}, n = {probe.n}"
        )
    if out:
        write_json(out, results)
    return 0
