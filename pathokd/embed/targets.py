"""Run a teacher over all tiles once and store what it says, for any number of trainings."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pathokd.data.batch import TileSource
from pathokd.data.targets import (
    CODEC_NAME,
    HEADER_NAME,
    PARTS,
    Stored,
    TargetSpec,
    TargetStore,
    bytes_per_tile,
    check_slides,
)
from pathokd.embed.target_files import AppendedArrays
from pathokd.embed.target_job import TargetJob
from pathokd.errors import StoreError
from pathokd.files import atomic_path, check_header, write_json
from pathokd.models import Standardizer, Teacher
from pathokd.models.codec import SecondMoments, TokenCodec, fit_codec
from pathokd.progress import Bars

COMMIT_BATCHES = 16
"""Batches between two commits: at most this much is computed again after a kill."""
SAMPLE_TILES = 4096
"""Most tiles looked at beforehand, for the statistics that PCA and int8 need; of few tiles, one in 32."""
LEAST_SAMPLE = 256
CHECKED_TILES = 16
TOLERANCE = 0.1
"""What recomputed targets may differ by, as a share of the targets' spread. Another tile's differ by 1.4 of it, a bf16
teacher's in a batch of another size by some 0.02."""

Codecs = dict[str, TokenCodec]


def write_targets(
    teacher: Teacher,
    source: TileSource,
    out_dir: str | Path,
    spec: TargetSpec | None = None,
    *,
    batch_size: int = 32,
    workers: int = 2,
    overwrite: bool = False,
) -> TargetStore:
    """Store a teacher's targets of every tile.

    Each tile is seen whole, in the one of its eight orientations that its key decides. Work is committed every few
    batches; the same call goes on where an earlier one was stopped, and does nothing but a check where one finished.
    The header is written last, so that unfinished targets are never taken for whole ones. Before that, and on a
    finished folder, some tiles are computed again and compared with what is stored.

    Args:
        teacher: on the device it should run on.
        source: the tiles.
        out_dir: the targets folder.
        spec: what is stored.
        batch_size: tiles per forward pass.
        workers: threads that read ahead.
        overwrite: compute anew, whatever `out_dir` holds.

    Returns:
        The finished targets.

    Raises:
        StoreError: made with other settings (names the first that differs), too little room on the disk, what is
            stored is damaged or not what the teacher says, or what the teacher says is no number.
        ValueError: a spec that does not fit the teacher.
    """
    out, spec = Path(out_dir), spec or TargetSpec()
    job = TargetJob(teacher, source, spec, batch_size, workers)
    if overwrite:
        _clear(out)
    if (out / HEADER_NAME).is_file():
        store = TargetStore(out)
        check_header(store.header, job.header, out / HEADER_NAME)
        check_slides(store.header, job.header.get("slides", {}), f"The targets in {out}", "cache")
        _check(job, _codecs(spec.dtype, store.codec()), store)
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return store
    parts = out / PARTS
    if (parts / HEADER_NAME).is_file():
        with _damage_named(parts / HEADER_NAME):
            found = json.loads((parts / HEADER_NAME).read_text(encoding="utf-8"))
        check_header(found, job.header, parts / HEADER_NAME)
        check_slides(found, job.header.get("slides", {}), f"The targets in {out}", "cache")
    else:
        shutil.rmtree(parts, ignore_errors=True)  # what an --overwrite that was killed has left is of other settings
        _check_room(out, job)
        write_json(parts / HEADER_NAME, job.header)
    with Bars() as bars:
        codecs = _sampled_codecs(job, parts, bars)
        statistics = _stream(job, codecs, parts, bars)
    return _finish(job, codecs, statistics, out)


def samples(spec: TargetSpec, n: int) -> int:
    """How many of `n` tiles are looked at beforehand: some where int8 or PCA need statistics first, else none."""
    needed = spec.dtype == "int8" or spec.pca is not None
    return min(n, max(LEAST_SAMPLE, min(SAMPLE_TILES, n // 32))) if needed else 0


def _check_room(out: Path, job: TargetJob) -> None:
    needed = len(job.source) * bytes_per_tile(job.arrays)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StoreError(
            f"The targets take {needed / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free: choose another folder, "
            "or store less (--tokens pooled, --pca 256, --dtype int8)."
        )


def _clear(out: Path) -> None:
    (out / HEADER_NAME).unlink(missing_ok=True)  # first: without a header nothing reads the arrays
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for name in (*(f"{array}.npy" for array in ("cls", "cls_scale", "patches", "patches_scale")), CODEC_NAME):
        (out / name).unlink(missing_ok=True)


# -------------------------------------------------------------------- statistics that codecs need


def _codecs(dtype: Any, stored: Stored) -> Codecs:
    """Codecs from `KIND.NAME` arrays; in int8, which needs some, there is none for tokens that are not stored."""
    kinds: dict[str, dict[str, Tensor]] = {"cls": {}, "patches": {}}
    for name, value in stored.items():
        kind, _, field = name.partition(".")
        if not field.startswith("target_"):
            kinds[kind][field] = torch.from_numpy(value)
    return {kind: TokenCodec(dtype, **values) for kind, values in kinds.items() if values or dtype != "int8"}


def _sampled_codecs(job: TargetJob, parts: Path, bars: Bars) -> Codecs:
    """Codecs, from a sample of the tiles where they need statistics; a resumed run takes those it began with."""
    path, spec = parts / CODEC_NAME, job.spec
    if not path.is_file():
        components = {"cls": None, "patches": spec.pca}
        moments = {
            kind: SecondMoments(job.teacher.embed_dim)
            for kind in job.kinds
            if spec.dtype == "int8" or components[kind] is not None
        }
        if moments:
            rows = job.spread(samples(spec, len(job.source)))
            for _, tokens in bars.track(job.tokens(rows), "Sampling", -(-len(rows) // job.batch_size)):
                for kind, moment in moments.items():
                    moment.update(tokens[kind])
        fitted = {kind: fit_codec(spec.dtype, moment, components[kind]) for kind, moment in moments.items()}
        _save(_named(fitted), path)
    with _damage_named(path):
        stored = {name: value.numpy() for name, value in load_file(path).items()}
    return {kind: codec.to(job.device) for kind, codec in _codecs(spec.dtype, stored).items()}


def _named(codecs: Codecs) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for kind, codec in codecs.items() for name, value in codec.tensors().items()}


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"{path} is damaged ({error}), and the unfinished run cannot go on: run `pathokd cache` with --overwrite."
        ) from error


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_path(path) as part:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, part)


# -------------------------------------------------------------------- the one pass over all tiles


def _stream(job: TargetJob, codecs: Codecs, parts: Path, bars: Bars) -> dict[str, Standardizer]:
    """Write all rows from the last committed one on; returns the statistics of all of them."""
    progress = parts / "progress.safetensors"
    statistics = {kind: Standardizer(job.teacher.embed_dim).to(job.device) for kind in job.kinds}
    done, n = 0, len(job.source)
    if progress.is_file():
        with _damage_named(progress):
            state = load_file(progress)
        done = int(state.pop("done"))
        for kind in job.kinds:
            statistics[kind].load_state_dict(
                {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}
            )
    if done == n:
        return statistics
    with AppendedArrays(parts, job.arrays, n, done) as files:
        batches = bars.track(job.tokens(range(done, n)), "Caching", -(-(n - done) // job.batch_size))
        for number, (rows, tokens) in enumerate(batches, start=1):
            for kind, values in tokens.items():
                statistics[kind].update(values)
                codes = codecs[kind].encode(values)
                files.append(kind, codes.values)
                if codes.scale is not None:
                    files.append(f"{kind}_scale", codes.scale)
            done = rows[-1] + 1
            if number % COMMIT_BATCHES == 0 or done == n:
                files.commit()
                state = {f"{kind}.{name}": v for kind in job.kinds for name, v in statistics[kind].state_dict().items()}
                _save({**state, "done": torch.tensor(done)}, progress)
    return statistics


# -------------------------------------------------------------------- the end, and what is checked there


def _finish(job: TargetJob, codecs: Codecs, statistics: dict[str, Standardizer], out: Path) -> TargetStore:
    parts = out / PARTS
    for name in job.arrays:
        # A run killed among these renames finds some of them done.
        with contextlib.suppress(FileNotFoundError):
            os.replace(parts / f"{name}.npy", out / f"{name}.npy")
    tensors = _named(codecs)
    for kind, statistic in statistics.items():
        tensors |= {f"{kind}.target_mean": statistic.mean, f"{kind}.target_std": statistic.std}
    _save(tensors, out / CODEC_NAME)
    lost = _check(job, codecs, TargetStore(out, header=job.header))
    write_json(out / HEADER_NAME, {**job.header, "facts": {**job.header["facts"], "lost": lost}})
    shutil.rmtree(parts, ignore_errors=True)
    return TargetStore(out)


def _check(job: TargetJob, codecs: Codecs, store: TargetStore) -> dict[str, float]:
    """Compute some tiles again and compare.

    Returns:
        By kind of token, the root of the share of the targets' variance that storing them lost.

    Raises:
        StoreError: what is stored is not what the teacher says.
    """
    codecs = {kind: codec.to(job.device) for kind, codec in codecs.items()}
    spread = {
        name.partition(".")[0]: float(np.linalg.norm(value)) / len(value) ** 0.5
        for name, value in store.codec().items()
        if name.endswith(".target_std")
    }
    lost: dict[str, list[float]] = {kind: [] for kind in spread}
    for numbers, tokens in job.tokens(job.spread(CHECKED_TILES)):
        stored = [store.read(row) for row in numbers]
        for kind, values in tokens.items():
            codec, names = codecs[kind], [name for name in (kind, f"{kind}_scale") if name in stored[0]]
            codes = [torch.from_numpy(np.stack([row[name] for row in stored])).to(job.device) for name in names]
            read = codec.decode(*codes)
            unit = max(spread[kind], 1e-12)
            off = _rms(read - codec.decode(*codec.encode(values))) / unit
            if not off < TOLERANCE:
                raise StoreError(
                    f"The {kind} tokens in {store.folder} are not what the teacher says of {len(numbers)} tiles when "
                    f"asked again (they differ by {off:.2f} of the spread): run `pathokd cache` with --overwrite."
                )
            lost[kind].append(_rms(read - values) / unit)
    return {kind: round(float(np.sqrt(np.mean(np.square(values)))), 6) for kind, values in lost.items()}


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
