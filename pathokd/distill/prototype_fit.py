"""From a teacher and tiles to its fixed prototypes: tokens, statistics, spherical k-means, centres, one file."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pathokd.data.batch import TileSource
from pathokd.data.targets import check_slides, slide_marks, tile_identity
from pathokd.distill.prototype_tokens import TokenShards, TokenSpec, check_loading, extract_tokens, read_tensor
from pathokd.errors import ManifestError
from pathokd.files import Header, atomic_path, check_header, make_header, write_json
from pathokd.losses.assignment import balanced_centres
from pathokd.models.prototype_head import FILE_NAME, SCHEMA, TokenKind, read_header, write_heads
from pathokd.models.spherical_kmeans import Clusters, lloyd_step, seed_centroids
from pathokd.models.teacher import Teacher
from pathokd.models.weights import state_sha256
from pathokd.progress import Bars

KINDS: tuple[TokenKind, TokenKind] = ("cls", "patches")
TOKENS_PER_PROTOTYPE = 4
"""Fewer tokens than this to a prototype are refused: the prototypes would be the tokens."""
SEEDING_TOKENS = 32768
"""k-means++ draws from so many tokens, or four to a prototype if that is more."""
TOLERANCE = 1e-4
"""k-means ends when a step lowers the mean distance by less than this share of it."""


@dataclass(frozen=True)
class PrototypeSpec:
    """How prototypes are made.

    Args:
        k: of the class token.
        k_patches: of patch tokens; None takes `k`.
        tokens: which tokens they are made from.
        iterations: most steps of k-means.
        temperatures: of the teacher, at which balanced centres are stored; a loss may use any between them.

    Raises:
        ValueError: a number out of range.
    """

    k: int = 4096
    k_patches: int | None = None
    tokens: TokenSpec = field(default_factory=TokenSpec)
    iterations: int = 25
    temperatures: tuple[float, ...] = (0.04, 0.05, 0.06, 0.07)

    def __post_init__(self) -> None:
        if min(self.k, self.k if self.k_patches is None else self.k_patches) < 2 or self.iterations < 1:
            raise ValueError(
                f"k and k-patches must be at least 2 and iterations at least 1, got {self.k}, {self.k_patches} and "
                f"{self.iterations}."
            )
        if not self.temperatures or min(self.temperatures) <= 0 or list(self.temperatures) != sorted(self.temperatures):
            raise ValueError(f"temperatures must be positive and rise, got {self.temperatures}.")

    def count(self, kind: TokenKind) -> int:
        """K of one kind of token."""
        return self.k if kind == "cls" else self.k_patches or self.k


class Summary(NamedTuple):
    """What came out for one kind of token."""

    k: int
    tokens: int
    similarity: float
    """Mean cosine of a token to its nearest prototype."""
    iterations: int
    unused: int
    """Prototypes that no token is nearest to."""
    largest: float
    """Share of the tokens that the most common prototype has."""


def fit_prototypes(
    teacher: Teacher,
    source: TileSource,
    out: str | Path,
    spec: PrototypeSpec = PrototypeSpec(),
    *,
    batch_size: int = 32,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Summary]:
    """Make OUT/prototypes.safetensors. Tokens lie in OUT/tokens meanwhile; a run that was cut off goes on there.

    Args:
        teacher: on its device, which k-means uses too unless it is Apple's MPS, which has no fp64 for its sums.
        source: tiles.
        out: folder.
        spec: how.
        batch_size: tiles per forward pass.
        workers: processes that read tiles.
        overwrite: start over whatever is there.

    Returns:
        A summary for `cls` and `patches`.

    Raises:
        StoreError: the folder holds prototypes made another way, or a damaged file of an unfinished run.
        ManifestError: too few tokens for so many prototypes.
        ValueError: no tile to a batch, or a negative number of processes.
    """
    check_loading(batch_size, workers)
    folder, header = Path(out), _header(teacher, source, spec)
    work = folder / "tokens"
    if overwrite:
        _check_size(teacher, len(source), spec)  # before anything is lost
        _clear(work)
        (folder / FILE_NAME).unlink(missing_ok=True)
    if (folder / FILE_NAME).is_file():
        found = read_header(folder)
        _check_made(found, header, folder / FILE_NAME)
        if (work / "header.json").is_file():  # killed at the very end
            _clear(work)
        return {kind: Summary(**found["results"][kind]) for kind in KINDS}
    if (work / "header.json").is_file():
        _check_made(json.loads((work / "header.json").read_text(encoding="utf-8")), header, work)
    _check_size(teacher, len(source), spec)
    write_json(work / "header.json", header)
    device = torch.device("cpu") if teacher.device.type == "mps" else teacher.device
    with Bars() as bars:
        shards = extract_tokens(teacher, source, spec.tokens, work, batch_size=batch_size, workers=workers, bars=bars)
        heads, results = {}, {}
        for kind in KINDS:
            heads[kind], results[kind] = _head(shards, kind, spec, device, bars)
    write_heads(folder, heads, {**header, "results": {kind: result._asdict() for kind, result in results.items()}})
    _clear(work)
    return {str(kind): result for kind, result in results.items()}


def _header(teacher: Teacher, source: TileSource, spec: PrototypeSpec) -> Header:
    settings: dict[str, Any] = {
        **teacher_settings(teacher),
        "precision": teacher.precision,
        "tiles": tile_identity(source),
        **asdict(spec),
    }
    header = make_header(SCHEMA, json.loads(json.dumps(settings)))  # tuples become lists, as they will be read back
    return {**header, "slides": slides} if (slides := slide_marks(source)) else header


def _check_made(found: Header, wanted: Header, where: Path) -> None:
    check_header(found, wanted, where)
    check_slides(found, wanted.get("slides", {}), f"The prototypes in {where}", "prototypes")


def _clear(work: Path) -> None:
    """Remove the tokens; their header last, so that after a kill no run takes what is left for its own."""
    for path in work.glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(work, ignore_errors=True)


def teacher_settings(teacher: Teacher) -> dict[str, Any]:
    """What a header says of the teacher a file was made from, for `made_from` to compare."""
    state, card = teacher.encoder.model.state_dict(), teacher.card
    return {
        "teacher": card.name,
        "weights_sha256": teacher.encoder.weights_sha256,
        "weights_sha256_bf16": state_sha256(state, torch.bfloat16),  # in which it may run during training
        "image_px": card.image_px,
        "mean": list(card.mean),
        "std": list(card.std),
    }


def _check_size(teacher: Teacher, tiles: int, spec: PrototypeSpec) -> None:
    draws = min(tiles, spec.tokens.max_tiles or tiles) * spec.tokens.views
    rows, columns = teacher.encoder.grid
    for kind, tokens in (("class", draws), ("patch", draws * min(spec.tokens.patches, rows * columns))):
        k = spec.count("cls" if kind == "class" else "patches")
        if tokens < TOKENS_PER_PROTOTYPE * k:
            views = -(-TOKENS_PER_PROTOTYPE * k * spec.tokens.views // max(tokens, 1))
            raise ManifestError(
                f"{tokens} {kind} tokens are too few for {k} prototypes, which need {TOKENS_PER_PROTOTYPE} each: take "
                f"--views {views}, more tiles, or a smaller k."
            )


def _head(
    shards: TokenShards, kind: TokenKind, spec: PrototypeSpec, device: torch.device, bars: Bars
) -> tuple[dict[str, Tensor], Summary]:
    """Prototypes of one kind of token."""
    mean, std, n = shards.statistics(kind)
    mean, std = mean.to(device), std.to(device)

    def blocks() -> Iterable[Tensor]:
        return shards.units(kind, mean, std)

    state = shards.folder / f"kmeans-{kind}.safetensors"
    centroids, iterations = _kmeans(blocks, n, kind, spec, state, bars)
    final = lloyd_step(blocks, centroids, np.random.default_rng())  # only to count: the centroids stay
    unit_sum = sum((block.double().sum(0) for block in blocks()), torch.zeros((), device=device))
    head = {
        "mean": mean,
        "std": std,
        "centroids": centroids,
        "counts": final.counts,
        # The mean logit of all tokens is the logit of their mean.
        "mean_centre": (centroids.double() @ (unit_sum / n)).float(),
        "temperatures": torch.tensor(spec.temperatures, dtype=torch.float32),
        "centres": balanced_centres(blocks, centroids, spec.temperatures),
    }
    used = final.counts > 0
    return head, Summary(
        k=len(centroids), tokens=n, similarity=final.similarity, iterations=iterations,
        unused=int((~used).sum()), largest=float(final.counts.max() / n),
    )  # fmt: skip


def _kmeans(
    blocks: Callable[[], Iterable[Tensor]], n: int, kind: TokenKind, spec: PrototypeSpec, state: Path, bars: Bars
) -> tuple[Tensor, int]:
    """Centroids, and the steps they took; each step is stored, so that a resumed run takes the same ones."""
    k, stream = spec.count(kind), [spec.tokens.seed, KINDS.index(kind)]
    if state.is_file():
        centroids = read_tensor(state, "centroids").to(next(iter(blocks())).device)
        gaps = read_tensor(state, "gaps").tolist()
    else:
        rng = np.random.default_rng(stream)
        centroids, gaps = seed_centroids(_sample(blocks, n, max(SEEDING_TOKENS, 4 * k), rng), k, rng), []
        _save(centroids, gaps, state)
    left = spec.iterations - len(gaps)
    for iteration in bars.track(range(len(gaps), spec.iterations), f"k-means of {kind} tokens", left):
        if len(gaps) > 1 and abs(gaps[-2] - gaps[-1]) <= TOLERANCE * gaps[-2]:
            break
        step: Clusters = lloyd_step(blocks, centroids, np.random.default_rng([*stream, iteration]))
        centroids, gaps = step.centroids, [*gaps, 1 - step.similarity]
        _save(centroids, gaps, state)
    return centroids, len(gaps)


def _sample(blocks: Callable[[], Iterable[Tensor]], n: int, most: int, rng: np.random.Generator) -> Tensor:
    """At most `most` tokens, drawn without replacement, in their order."""
    chosen = np.sort(rng.permutation(n)[:most])
    parts, start = [], 0
    for block in blocks():
        here = chosen[(chosen >= start) & (chosen < start + len(block))] - start
        parts.append(block[torch.from_numpy(here).to(block.device)])
        start += len(block)
    return torch.cat(parts)


def _save(centroids: Tensor, gaps: list[float], state: Path) -> None:
    with atomic_path(state) as part:
        save_file({"centroids": centroids.cpu(), "gaps": torch.tensor(gaps, dtype=torch.float64)}, part)
