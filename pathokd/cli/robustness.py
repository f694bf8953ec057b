"""`pathokd robustness`: models or features against pairs, into tables, figures and one page."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pathokd.cli.named import named_models
from pathokd.cli.teacher import device_for

if TYPE_CHECKING:
    from pathokd.evaluate.paired_features import ModelFeatures
    from pathokd.evaluate.paired_set import PairedSet


def robustness(
    models: list[str],
    *,
    pairs: str,
    out: str,
    readout: Literal["cls", "mean", "cls+mean"] = "cls",
    k: list[int] = [1, 3, 5, 10],  # noqa: B006 (never changed; jsonargparse wants a list)
    n_tiles: int | None = None,
    index: list[str] = [],  # noqa: B006
    neighbour_k: int = 11,
    turn_tiles: int = 128,
    severity_tiles: int = 0,
    compat: Literal["plism"] | None = None,
    thorough: bool = False,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    seed: int = 0,
    drop_unpaired: bool = False,
    overwrite: bool = False,
) -> int:
    """Measure how robust models are.

    Args:
        models: NAME=MODEL, or models: cards, exported folders, or features; differences are taken from the first.
        pairs: Paired manifest (CSV, Parquet), packed folder, PLISM's files, or a folder per scanner.
        out: Folder for report.html, figures, tables as CSV and robustness.json; a run that was cut off goes on.
        readout: How tokens become one vector, the same for all models.
        k: Nearest tiles that count as found.
        n_tiles: Places that take part in retrieval, drawn by the seed; all by default.
        index: Files of a published subset (.npy): the leaderboard number is given at each.
        neighbour_k: k of the robustness index.
        turn_tiles: Tiles turned and flipped; 0 leaves this out.
        severity_tiles: Labelled tiles changed by every simulated factor; 0 leaves this out, 200 takes minutes.
        compat: plism rounds as the published benchmark does.
        thorough: Clusters and confounding with the published searches and repetitions: far longer.
        batch_size: Tiles per forward pass.
        workers: Threads that read tiles.
        device: auto, cpu, cuda or mps.
        seed: Of folds, subsets and resampling.
        drop_unpaired: Leave out rows of a manifest whose place occurs once.
        overwrite: Do everything again.
    """
    from rich.console import Console

    from pathokd.evaluate.paired_readers import open_pairs
    from pathokd.evaluate.robustness import RobustnessSpec, measure_robustness, read_index
    from pathokd.report.robust_page import write_page
    from pathokd.report.robust_words import headlines
    from pathokd.report.robustness import robustness_table, write_robustness

    called = [Path(file).stem for file in index]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise ValueError(
            f"--index: several files are called {twice}, by which their numbers would be told: rename one."
        )
    chosen = str(device_for(device, "auto"))
    spec = RobustnessSpec(tuple(k), n_tiles, neighbour_k, turn_tiles, severity_tiles, compat, thorough, seed, chosen)
    named = named_models(models)
    tiles = open_pairs(pairs, drop_unpaired=drop_unpaired)
    for note in tiles.notes:
        print(note)
    indices = {name: read_index(file, tiles) for name, file in zip(called, index, strict=True)}
    opened = [
        _open(name, text, tiles, Path(out), readout, batch_size, workers, device, overwrite)
        for name, text in named.items()
    ]
    result = measure_robustness(opened, tiles, out, spec, indices=indices, overwrite=overwrite)
    write_robustness(result, out)
    write_page(result, out)
    table = robustness_table(result)
    if table.rows:
        Console().print(table)
    for row in result.not_shown.itertuples():
        print(f"Not shown ({row.model}): {row.what}: {row.why}")
    for sentence in headlines(result):
        print(sentence)
    print(f"To look at: {out}/report.html; all numbers with n and interval: {out}/measures.csv, {out}/robustness.json")
    return 0


def _open(
    name: str,
    text: str,
    tiles: "PairedSet",
    out: Path,
    readout: Literal["cls", "mean", "cls+mean"],
    batch_size: int,
    workers: int,
    device: str,
    overwrite: bool,
) -> "ModelFeatures":
    from pathokd.embed.embedder import Embedder
    from pathokd.evaluate.paired_features import holds_features, model_features, stored_features

    if holds_features(text):
        return stored_features(name, text, tiles)
    embedder = Embedder(text, readout, device=device, batch_size=batch_size)
    return model_features(name, embedder, tiles, out / "features" / name, workers=workers, overwrite=overwrite)
