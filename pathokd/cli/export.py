"""`pathokd export`: what leaves pathokd, a student as timm loads it, or embeddings as another tool reads them."""

from pathlib import Path
from typing import Literal

from pathokd.cli.verbs import slides_outcome


def export(
    run: str,
    *,
    out: str,
    layout: Literal["trident", "clam", "stamp", "anndata", "parquet"] | None = None,
    student: str | None = None,
    which: Literal["best", "last"] | None = None,
    untrained: bool = False,
    half: bool = False,
    licence: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    skip_errors: bool = False,
) -> int:
    """Export a student, or embeddings.

    Args:
        run: Folder of a fit, or a .ckpt file; with --layout the folder that `pathokd embed` wrote.
        out: Folder for weights, config, card and adaptor heads; for embeddings, their files and summary.csv.
        layout: Of embeddings: whose files to write.
        student: Which one, of a run with model.more_students; by default model.student.
        which: Checkpoint to take; by default the best of model.student if there is one, of others the last.
        untrained: Export the same student with random weights, as a control.
        half: Store fp16.
        licence: Licence of the student; by default the teacher's.
        name: Name in the card; by default the folder's.
        overwrite: Replace an earlier export.
        skip_errors: Exit with 0 although a slide's embeddings could not be converted.
    """
    if layout is not None:
        given = {
            "student": student,
            "which": which,
            "untrained": untrained,
            "half": half,
            "licence": licence,
            "name": name,
        }
        _refuse_student(run, {option for option, value in given.items() if value})
        return _embeddings(run, out, layout, overwrite, skip_errors)
    if any(Path(run).glob("*.h5")) and not (Path(run) / "checkpoints").exists():
        raise ValueError(
            f"{run} holds embeddings: say whose files to write, --layout trident, clam, stamp, anndata or parquet."
        )
    from pathokd.export import export_run, load_line
    from pathokd.models.student import FIRST

    folder = export_run(
        run,
        out,
        student=student or FIRST,
        which=which,
        untrained=untrained,
        half=half,
        licence=licence,
        name=name,
        overwrite=overwrite,
    )
    print(f"{folder}: load it with {load_line(folder)}")
    return 0


def _refuse_student(run: str, options: set[str]) -> None:
    if (Path(run) / "checkpoints").exists() or Path(run).suffix == ".ckpt":
        raise ValueError(f"{run} is a training run, and --layout is for embeddings: leave --layout out to export it.")
    if options:
        raise ValueError(f"--{min(options)} is for students and --layout for embeddings: give one of them.")


def _embeddings(
    folder: str,
    out: str,
    layout: Literal["trident", "clam", "stamp", "anndata", "parquet"],
    overwrite: bool,
    skip_errors: bool,
) -> int:
    from pathokd.embed.convert import convert_embeddings

    summary = convert_embeddings(folder, out, layout, overwrite=overwrite)
    failed, flagged = int((summary["status"] == "failed").sum()), int(summary["n_flagged"].sum())
    kept = {"parquet": "kept without features", "anndata": "left out and listed"}.get(layout, "left out")
    print(
        f"{summary['n_tiles'].sum()} tiles of {len(summary) - failed} slides in {out}, as {layout} has them; "
        f"{flagged} flagged tiles {kept}."
    )
    return slides_outcome(failed, len(summary), f"{out}/summary.csv", skip_errors)
