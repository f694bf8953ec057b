"""The clustering score against scikit-learn run by hand, at its ends, and under what must not matter."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from pathokd.metrics.clustering import clustering_score, quads


def cohort(
    biology: float, place: float, classes: int = 2, centres: int = 2, each: int = 12
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    n = classes * centres * each
    bio, centre = np.arange(n) % classes, np.arange(n) // classes % centres
    x = rng.normal(size=(n, 10)) * 0.3
    x = x + biology * rng.normal(size=(classes, 10))[bio] + place * rng.normal(size=(centres, 10))[centre]
    return torch.from_numpy(x).float(), np.array(list("xyz"))[bio], np.array(list("ABC"))[centre]


def test_clusters_of_classes_score_one_and_of_centres_minus_one() -> None:
    for biology, place, want in ((3.0, 0.0, 1.0), (0.0, 3.0, -1.0)):
        found = clustering_score(*cohort(biology, place), clusters=range(2, 6), trials=3)
        # Chance makes the other index a little off 0.
        assert found.score == pytest.approx(want, abs=0.05)
        assert found.quads[0].clusters == 2


def test_equals_scikit_learn_by_hand() -> None:
    x, bio, centre = cohort(0.3, 0.3)  # vague enough that every start ends elsewhere
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    silhouettes = {}
    for k in range(4, 8):
        labels = KMeans(k, init="random", n_init=20, random_state=7).fit(unit).labels_
        silhouettes[k] = silhouette_score(unit, labels, metric="cosine")
    chosen = max(silhouettes, key=silhouettes.get)
    each = []
    for trial in range(3):
        labels = KMeans(chosen, init="random", n_init=5, random_state=7 + trial).fit(unit).labels_
        each.append(adjusted_rand_score(bio, labels) - adjusted_rand_score(centre, labels))
    assert len(set(each)) == 3
    found = clustering_score(x, bio, centre, clusters=range(4, 8), trials=3, seed=7)
    assert found.quads[0].clusters == chosen
    assert found.score == pytest.approx(np.mean(each), abs=1e-12)
    assert found.sd == pytest.approx(np.std(each, ddof=1), abs=1e-12)
    assert found.score == pytest.approx(found.ari_bio - found.ari_confounder, abs=1e-12)


def test_all_quads_take_part_and_scale_does_not_matter() -> None:
    x, bio, centre = cohort(1.0, 0.5, classes=3, centres=3, each=5)
    found = clustering_score(x, bio, centre, clusters=[2], trials=2)
    assert len(found.quads) == 9
    assert found.n == 45
    assert all(quad.n == 20 for quad in found.quads)
    assert found.score == pytest.approx(np.mean([quad.score for quad in found.quads]))
    again = clustering_score(30 * x, bio, centre, clusters=[2], trials=2)
    assert again.score == pytest.approx(found.score, abs=1e-9)


def test_incomplete_quads_are_left_out() -> None:
    x, bio, centre = cohort(1.0, 0.5, classes=3, centres=2, each=5)
    keep = ~((bio == "z") & (centre == "B"))
    found = clustering_score(x[keep], bio[keep], centre[keep], clusters=[2], trials=1)
    assert [(quad.classes, quad.centres) for quad in found.quads] == [(("x", "y"), ("A", "B"))]
    assert found.n == 20
    assert np.isnan(clustering_score(x[keep], bio[keep], centre[keep], clusters=[2], trials=1).sd)


def test_a_collapsed_encoder_scores_zero_without_a_warning() -> None:
    _, bio, centre = cohort(1.0, 1.0)
    found = clustering_score(torch.full((48, 10), 0.3), bio, centre, trials=2)
    assert (found.score, found.quads[0].clusters) == (0.0, 1)
    # Three different rows: no more than three clusters are tried.
    few = torch.eye(10)[torch.arange(48) % 3]
    assert clustering_score(few, bio, centre, trials=1).quads[0].clusters == 3


def test_errors_say_what_to_do() -> None:
    x, bio, centre = cohort(1.0, 1.0)
    with pytest.raises(ValueError, match="two classes that both occur in the same two centres"):
        clustering_score(x, bio, np.full(48, "A"))
    assert list(quads(bio, np.where(bio == "x", "A", "B"))) == []
    with pytest.raises(ValueError, match="clusters should be 2 or more"):
        clustering_score(x, bio, centre, clusters=[1])
    with pytest.raises(ValueError, match="in 1 trial or more"):
        clustering_score(x, bio, centre, trials=0)
    with pytest.raises(ValueError, match="one label for each of 48 tiles"):
        clustering_score(x, bio[1:], centre)
    x[3] = 0
    with pytest.raises(ValueError, match="1 of 48 rows"):
        clustering_score(x, bio, centre)
