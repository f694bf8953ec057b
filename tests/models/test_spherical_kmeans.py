"""Spherical k-means beside scikit-learn's, and its parts by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from pathokd.models.spherical_kmeans import Blocks, lloyd_step, refill, seed_centroids


def separated(clusters: int = 9, each: int = 30, dim: int = 12, noise: float = 0.05) -> tuple[torch.Tensor, np.ndarray]:
    """Unit vectors around orthogonal axes, shuffled, and whose they are."""
    generator = torch.Generator().manual_seed(0)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(clusters), each))
    x = torch.eye(dim)[torch.from_numpy(labels)] + noise * torch.randn(len(labels), dim, generator=generator)
    return F.normalize(x, dim=1), labels


def cloud(n: int = 1500, dim: int = 8) -> torch.Tensor:
    """Without clear clusters."""
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(3)) + 0.5, dim=1)


def blocks(x: torch.Tensor, size: int = 10**6) -> Blocks:
    return lambda: torch.split(x, size)


def fit(x: torch.Tensor, k: int, steps: int = 30, seed: int = 0) -> tuple[torch.Tensor, float]:
    rng = np.random.default_rng(seed)
    centroids = seed_centroids(x, k, rng)
    for _ in range(steps):
        centroids = lloyd_step(blocks(x), centroids, rng).centroids
    return centroids, lloyd_step(blocks(x), centroids, rng).similarity


def test_separated_clusters_are_found_exactly() -> None:
    x, labels = separated()
    centroids, _ = fit(x, 9)
    owner = (x @ centroids.T).argmax(1).numpy()
    assert len(set(zip(owner, labels, strict=True))) == len(set(labels)) == len(set(owner))
    for cluster in range(9):
        mean = x[torch.from_numpy(labels == cluster)].double().mean(0)
        own = centroids[int(owner[labels == cluster][0])]
        assert torch.allclose(own, F.normalize(mean, dim=0).float(), atol=1e-6)


@pytest.mark.parametrize("k", [12, 300])
def test_inertia_is_within_a_few_per_cent_of_scikit_learns(k: int) -> None:
    """On the sphere |x - c|^2 = 2 (1 - cos). At k = 300 centroids are seeded several at a time."""
    x = cloud()
    theirs = KMeans(k, n_init=1, random_state=0).fit(x.numpy())
    unit = F.normalize(torch.from_numpy(theirs.cluster_centers_), dim=1)
    their_gap = float((1 - (x @ unit.T).max(1).values).mean())
    _, similarity = fit(x, k)
    assert 1 - similarity <= 1.05 * their_gap


def test_a_step_is_the_mean_direction_of_each_cluster() -> None:
    x, start = cloud(200), cloud(7)
    step = lloyd_step(blocks(x), start, np.random.default_rng(0))
    cosines = x.double().numpy() @ start.double().numpy().T
    owner = cosines.argmax(axis=1)
    for cluster in range(7):
        mean = x.double().numpy()[owner == cluster].sum(axis=0)
        assert np.allclose(step.centroids[cluster].numpy(), mean / np.linalg.norm(mean), atol=1e-6)
    assert np.array_equal(step.counts.numpy(), np.bincount(owner, minlength=7))
    assert step.similarity == pytest.approx(cosines.max(axis=1).mean(), abs=1e-6)


def test_blocks_do_not_change_a_step() -> None:
    x, start = cloud(), cloud(20)
    whole, parts = (lloyd_step(blocks(x, size), start, np.random.default_rng(0)) for size in (10**6, 137))
    assert torch.allclose(whole.centroids, parts.centroids, atol=1e-6)
    assert torch.equal(whole.counts, parts.counts)


def test_each_step_lowers_the_inertia() -> None:
    x, rng = cloud(), np.random.default_rng(0)
    centroids, seen = seed_centroids(x, 20, rng), []
    for _ in range(10):
        centroids, _, similarity = lloyd_step(blocks(x), centroids, rng)
        seen.append(similarity)
    assert np.all(np.diff(seen) > -1e-7)


def test_an_empty_cluster_takes_a_member_of_the_largest() -> None:
    x, _ = separated()
    start = torch.cat([x[:1], -torch.eye(12)[:3]])  # nobody is on the far side
    step = lloyd_step(blocks(x, 50), start, np.random.default_rng(0))
    assert step.counts.tolist()[0] > 0
    assert len(torch.unique(step.centroids, dim=0)) == 4
    for row in np.flatnonzero(step.counts.numpy() == 0):
        assert bool((x == step.centroids[row]).all(1).any())


def test_refill_halves_what_it_takes_from() -> None:
    owner = np.array([0] * 8 + [1] * 5, np.int32)
    taken = refill(np.array([8, 5, 0, 0]), owner, np.random.default_rng(0))
    assert set(taken) == {2, 3}
    assert owner[taken[2]] == 0  # 8 members
    assert owner[taken[3]] == 1  # then 5 against 4
    assert refill(np.array([8, 5]), owner, np.random.default_rng(0)) == {}


def test_refill_stops_when_nothing_is_left_to_take() -> None:
    """One direction for nearly all tokens, as on blank tiles: far more empty clusters than can be filled."""
    counts = np.array([0] * 3 + [40] + [0] * 60)
    taken = refill(counts, np.full(40, 3, np.int32), np.random.default_rng(0))
    assert 0 < len(taken) <= 40
    assert len(set(taken.values())) == len(taken)
    assert 3 not in taken


def test_seeds_are_places_of_the_sample_and_a_function_of_the_seed() -> None:
    x = cloud(600)
    one, same, other = (seed_centroids(x, 400, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(torch.unique(one, dim=0)) == 400
    assert all(bool((x == row).all(1).any()) for row in one[:5])
    alike = x[:1].expand(10, 8)
    assert seed_centroids(alike, 5, np.random.default_rng(0)).shape == (5, 8)
    with pytest.raises(ValueError, match="400 centroids need as many vectors, got 10"):
        seed_centroids(alike, 400, np.random.default_rng(0))
