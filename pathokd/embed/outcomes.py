"""What came of each slide where files are made from embeddings: exported for other tools, or drawn."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd

from pathokd.files import atomic_path, check_folder, check_summary
from pathokd.progress import Bars


class Outcome(NamedTuple):
    """One row of summary.csv."""

    slide_id: str
    path: str
    """What was read: the embeddings, or the slide as found."""
    status: Literal["ok", "failed", "skipped"]
    n_tiles: int
    """Good tiles."""
    n_flagged: int
    seconds: float
    message: str


def check_place(out: Path, verb: str) -> None:
    """Raise StoreError if OUT is a file, or OUT/summary.csv the table of another verb, such as that of the features."""
    check_folder(out)
    check_summary(out / "summary.csv", ("slide_id", "status", "n_flagged"), verb)


def conclude(outcomes: Collection[Outcome], out: Path, bars: Bars) -> pd.DataFrame:
    """Say what failed and write OUT/summary.csv.

    Args:
        outcomes: one per slide.
        out: folder.
        bars: where failures are said.

    Returns:
        The summary, one row per slide.
    """
    for outcome in outcomes:
        if outcome.status == "failed":
            bars.say(f"{outcome.slide_id}: {outcome.message}")
    summary = pd.DataFrame(list(outcomes), columns=list(Outcome._fields))
    with atomic_path(out / "summary.csv") as part:
        summary.to_csv(part, index=False)
    return summary
