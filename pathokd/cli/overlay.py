"""`pathokd overlay`: pictures of what was embedded."""

from pathokd.cli.verbs import slides_outcome


def overlay(
    features: str, *, out: str, slides: str | None = None, overwrite: bool = False, skip_errors: bool = False
) -> int:
    """Draw slides with their tiles and features.

    Args:
        features: Folder of `pathokd embed`, or one of its files, whose colours are then its own.
        out: Folder for SLIDE_ID.jpg and summary.csv.
        slides: Folder the slides lie in now, if they were moved since.
        overwrite: Draw again what is there.
        skip_errors: Exit with 0 although a slide could not be drawn.
    """
    from pathokd.report.overlay import draw_overlays

    summary = draw_overlays(features, out, slides=slides, overwrite=overwrite)
    failed = int((summary["status"] == "failed").sum())
    print(f"{len(summary) - failed} slides in {out}")
    return slides_outcome(failed, len(summary), f"{out}/summary.csv", skip_errors)
