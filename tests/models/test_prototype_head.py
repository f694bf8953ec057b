"""The teacher's fixed head and its file; the student's head."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from pathokd.errors import WeightsError
from pathokd.files import make_header
from pathokd.models.dino_head import DinoHead, DinoHeadSpec
from pathokd.models.prototype_head import SCHEMA, PrototypeHead, read_head, read_header, write_heads


def tensors(k: int = 5, dim: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "mean": torch.randn(dim, generator=generator),
        "std": torch.rand(dim, generator=generator) + 0.5,
        "centroids": F.normalize(torch.randn(k, dim, generator=generator), dim=1),
        "counts": torch.arange(k),
        "mean_centre": torch.randn(k, generator=generator),
        "temperatures": torch.tensor([0.04, 0.05, 0.07]),
        "centres": torch.randn(3, k, generator=generator),
    }


def test_tokens_are_standardised_and_of_length_one() -> None:
    given = tensors()
    head = PrototypeHead(given)
    x = 10 * torch.randn(2, 3, 4, dtype=torch.float64)
    z = (x - given["mean"].double()) / (given["std"].double() + 1e-6)
    assert torch.allclose(head(x.float()).double(), z / z.norm(dim=-1, keepdim=True), atol=1e-5)
    assert head(x.half()).dtype == torch.float32
    assert (head.count, head.dim) == (5, 4)
    assert not head.state_dict()
    assert not list(head.parameters())


def test_centres_lie_between_the_stored_ones() -> None:
    given = tensors()
    head = PrototypeHead(given)
    for number, temperature in enumerate((0.04, 0.05, 0.07)):
        assert torch.allclose(head.centre_at(temperature), given["centres"][number], atol=1e-6)
    middle = 0.25 * given["centres"][1] + 0.75 * given["centres"][2]
    assert torch.allclose(head.centre_at(0.065), middle, atol=1e-5)
    for outside in (0.03, 0.08):
        with pytest.raises(ValueError, match=r"from 0.04 to 0.07, got 0.0"):
            head.centre_at(outside)


@pytest.mark.parametrize("ends", [(0.04, 0.06), (0.1, 0.2), (0.03, 0.08)])
def test_the_ends_of_the_range_belong_to_it_whatever_fp32_makes_of_them(ends: tuple[float, float]) -> None:
    given = {**tensors(), "temperatures": torch.tensor(ends), "centres": tensors()["centres"][:2]}
    head = PrototypeHead(given)
    for temperature, centre in zip(ends, given["centres"], strict=True):
        assert torch.allclose(head.centre_at(temperature), centre, atol=1e-5)


def test_a_single_temperature_is_enough() -> None:
    given = {**tensors(), "temperatures": torch.tensor([0.05]), "centres": tensors()["centres"][:1]}
    assert torch.equal(PrototypeHead(given).centre_at(0.05), given["centres"][0])


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    header = {**make_header(SCHEMA, {"weights_sha256": "abc"}), "results": {}}
    path = write_heads(tmp_path, {"cls": tensors(5), "patches": tensors(7)}, header)
    assert read_header(tmp_path) == read_header(path) == header
    for kind, k in (("cls", 5), ("patches", 7)):
        head = read_head(tmp_path, kind)  # type: ignore[arg-type]
        assert torch.equal(head.centroids, tensors(k)["centroids"])
        assert torch.equal(head.counts, tensors(k)["counts"])


def test_what_is_no_head_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="make them with `pathokd prototypes"):
        read_head(tmp_path, "cls")
    path = write_heads(tmp_path, {"cls": tensors()}, make_header("other/1", {}))
    with pytest.raises(WeightsError, match="has schema 'other/1'"):
        read_header(path)
    path = write_heads(tmp_path, {"cls": tensors()}, make_header(SCHEMA, {}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        read_head(path, "cls")
    with pytest.raises(ValueError, match=r"mean must have shape \(4,\), got \(3,\)"):
        PrototypeHead({**tensors(), "mean": torch.zeros(3)})


def test_random_prototypes_are_unit_vectors_of_a_seed() -> None:
    one, same = PrototypeHead.random(6, 9, 1), PrototypeHead.random(6, 9, 1)
    assert torch.equal(one.centroids, same.centroids)
    assert torch.allclose(one.centroids.norm(dim=1), torch.ones(9))
    assert torch.equal(one.centre_at(0.055), torch.zeros(9))


def test_the_students_logits_are_those_of_dinos_head() -> None:
    """The same MLP, normalisation and weight-normed layer put together from torch's own parts."""
    head = DinoHead(8, 20, DinoHeadSpec(16, 6, 3, "weight-norm"))
    assert head.length is not None
    head.length.data.uniform_(0.5, 2.0)
    last = weight_norm(torch.nn.Linear(6, 20, bias=False), dim=0)
    last.parametrizations.weight.original0.data.copy_(head.length.data[:, None])
    last.parametrizations.weight.original1.data.copy_(head.direction.data)
    x = torch.randn(3, 5, 8)
    assert torch.allclose(head(x) @ head.prototypes().T, last(F.normalize(head.mlp(x), dim=-1)), atol=1e-5)
    assert [type(module).__name__ for module in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]


def test_cosine_prototypes_have_length_one() -> None:
    head = DinoHead(8, 20, DinoHeadSpec(16, 6))
    assert head.length is None
    head.direction.data.mul_(7)
    assert torch.allclose(head.prototypes().norm(dim=1), torch.ones(20), atol=1e-6)
    assert torch.allclose(head(torch.randn(4, 8)).norm(dim=1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"bottleneck_dim": 0}])
def test_impossible_heads_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        DinoHeadSpec(**wrong)  # type: ignore[arg-type]
