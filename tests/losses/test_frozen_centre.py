"""What Sinkhorn-Knopp on 16 tokens, and a frozen centre, miss of a large batch: embedded teacher, phantom tiles."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pathokd.cli.main import main
from pathokd.data.wsi import open_tiles
from pathokd.distill.prototype_tokens import TokenSpec, extract_tokens
from pathokd.losses.assignment import assign, sinkhorn_centre
from pathokd.models.spherical_kmeans import lloyd_step, seed_centroids
from pathokd.models.teacher import TeacherSpec, build_teacher
from pathokd.progress import Bars

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_frozen_centre_is_near_a_large_batch_and_sinkhorn_on_sixteen_is_not(tmp_path: Path) -> None:
    """Total variation, mean over tokens; the centre comes from other tiles than those it is used on."""
    assert main(["tile", str(ROOT / "tile_data/phantom/slides.csv"), "--out", str(tmp_path / "tiles")]) == 0
    teacher = build_teacher(TeacherSpec(str(ROOT / "tile_data/teacher")))
    spec = TokenSpec(patches=12, max_tiles=600)
    with Bars() as bars:
        shards = extract_tokens(
            teacher, open_tiles(tmp_path / "tiles"), spec, tmp_path / "tokens", batch_size=32, workers=0, bars=bars
        )
    mean, std, _ = shards.statistics("patches")
    x = torch.cat(list(shards.units("patches", mean, std)))
    other, here = x.chunk(2)  # tokens follow their tiles
    rng = np.random.default_rng(0)
    prototypes = seed_centroids(other, 256, rng)
    for _ in range(15):
        prototypes = lloyd_step(lambda: [other], prototypes, rng).centroids
    logits = here @ prototypes.T
    batches = [torch.from_numpy(rng.permutation(len(here))[:16]) for _ in range(40)]
    for tau in (0.04, 0.07):
        wanted = assign(logits, sinkhorn_centre(here, prototypes, tau), tau)
        frozen = assign(logits, sinkhorn_centre(other, prototypes, tau), tau)
        few = [assign(logits[rows], sinkhorn_centre(here[rows], prototypes, tau), tau) for rows in batches]
        off_frozen = _variation(frozen, wanted)
        off_sinkhorn = float(np.mean([_variation(q, wanted[rows]) for q, rows in zip(few, batches, strict=True)]))
        print(f"tau {tau}: Sinkhorn-Knopp on 16 tokens {off_sinkhorn:.3f} off, frozen centre {off_frozen:.3f}")
        assert off_sinkhorn > 0.4
        assert off_frozen < 0.15


def _variation(q: torch.Tensor, other: torch.Tensor) -> float:
    return float((q - other).abs().sum(1).mean() / 2)
