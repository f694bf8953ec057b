"""Cross-entropy over prototypes: against float64 written out plainly, by finite differences, and in bounded memory."""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pathokd.losses import DINO, IBOT
from pathokd.losses.assignment import CHUNK_ELEMENTS, sinkhorn_centre
from pathokd.losses.cross_entropy import StudentSide, TeacherSide, prototype_cross_entropy

TAU_S, TAU_T = 0.1, 0.05


def sides(
    n: int = 37, k: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[StudentSide, TeacherSide]:
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int, dim: int) -> torch.Tensor:
        x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        return (x / x.norm(dim=1, keepdim=True)).to(dtype)

    centre = (0.2 * torch.randn(k, generator=generator, dtype=torch.float64)).to(dtype)
    student = StudentSide(unit(n, 6).requires_grad_(), unit(k, 6).requires_grad_(), TAU_S)
    return student, TeacherSide(unit(n, 9), unit(k, 9), centre, TAU_T)


def softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def reference(student: StudentSide, teacher: TeacherSide) -> tuple[float, list[npt.NDArray[np.float64]]]:
    """H(q, p) and its gradients, whole matrices in float64."""
    y, w = (t.detach().double().numpy() for t in student[:2])
    x, c, centre = (t.double().numpy() for t in teacher[:3])
    q = softmax((x @ c.T - centre) / teacher.temperature)
    p = softmax(y @ w.T / student.temperature)
    error = (p - q) / (len(y) * student.temperature)
    return float(-(q * np.log(p)).sum(axis=1).mean()), [error @ w, error.T @ y]


@pytest.mark.parametrize("chunk_elements", [1, 11 * 5, CHUNK_ELEMENTS], ids=["token", "five", "whole"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_match_float64(dtype: torch.dtype, tolerance: float, chunk_elements: int) -> None:
    student, teacher = sides(dtype=dtype)
    loss = prototype_cross_entropy(student, teacher, chunk_elements)
    (3 * loss).backward()
    value, gradients = reference(student, teacher)
    assert loss.dtype == dtype
    assert float(loss.detach()) == pytest.approx(value, abs=tolerance, rel=tolerance)
    for tensor, gradient in zip(student[:2], gradients, strict=True):
        assert tensor.grad is not None
        assert np.allclose(tensor.grad.double().numpy(), 3 * gradient, atol=tolerance)


def test_gradcheck() -> None:
    student, teacher = sides(5, 4)

    def loss(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return prototype_cross_entropy(StudentSide(y, w, TAU_S), teacher, chunk_elements=4 * 2)

    assert torch.autograd.gradcheck(loss, student[:2])
    for wanted in ([True, False], [False, True]):
        inputs = [t.detach().requires_grad_(need) for t, need in zip(student[:2], wanted, strict=True)]
        assert torch.autograd.gradcheck(loss, inputs)


def test_autocast_does_not_lower_the_precision() -> None:
    student, teacher = sides(dtype=torch.float32)
    plain = prototype_cross_entropy(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototype_cross_entropy(student, teacher), plain)


def test_the_same_distribution_costs_its_entropy_and_pulls_nowhere() -> None:
    student, _ = sides()
    same = TeacherSide(student.tokens.detach(), student.prototypes.detach(), torch.zeros(11), TAU_S)
    loss = prototype_cross_entropy(student, same)
    loss.backward()
    p = softmax((same.tokens @ same.prototypes.T).numpy() / TAU_S)
    assert float(loss.detach()) == pytest.approx(float(-(p * np.log(p)).sum(axis=1).mean()), abs=1e-12)
    for tensor in student[:2]:
        assert tensor.grad is not None
        assert tensor.grad.abs().max() < 1e-14


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_no_student_is_below_the_teachers_entropy(seed: int) -> None:
    student, teacher = sides(seed=seed)
    x, c, centre = (t.numpy() for t in teacher[:3])
    q = softmax((x @ c.T - centre) / TAU_T)
    entropy = float(-(q * np.log(np.maximum(q, 1e-300))).sum(axis=1).mean())
    assert prototype_cross_entropy(student, teacher).item() >= entropy - 1e-12


def test_a_collapsed_student_pays_the_information_it_dropped() -> None:
    """With one answer for all tokens the best loss is the entropy of the mean target, above the mean entropy."""
    _, teacher = sides(400, 8)
    x, c, centre = (t.numpy() for t in teacher[:3])
    q = softmax((x @ c.T - centre) / TAU_T)
    best = q.mean(axis=0)
    constant = torch.ones(400, 1, dtype=torch.float64)
    answer = torch.from_numpy(np.log(best))[:, None]
    collapsed = float(prototype_cross_entropy(StudentSide(constant, answer, 1.0), teacher))
    assert collapsed == pytest.approx(float(-(best * np.log(best)).sum()), abs=1e-12)
    assert collapsed > float(-(q * np.log(q)).sum(axis=1).mean()) + 0.5


def test_a_colder_teacher_asks_for_its_nearest_prototype() -> None:
    student, teacher = sides()
    cold = prototype_cross_entropy(student, teacher._replace(temperature=1e-5)).item()
    nearest = (teacher.tokens @ teacher.prototypes.T - teacher.centre).argmax(1)
    logits = student.tokens @ student.prototypes.T / TAU_S
    assert cold == pytest.approx(torch.nn.functional.cross_entropy(logits, nearest).item(), abs=1e-9)
    hot = prototype_cross_entropy(student._replace(temperature=1e6), teacher).item()
    assert hot == pytest.approx(math.log(11), abs=1e-5)


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes alive that operations under it have allocated, and the largest tensor among them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)

        def gone() -> None:
            self.alive -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def test_all_tokens_at_131072_prototypes_stay_within_the_stated_memory() -> None:
    n, k, dim = 128, 131_072, 4
    generator = torch.Generator().manual_seed(0)
    student = StudentSide(
        torch.randn(n, dim, generator=generator).requires_grad_(),
        torch.randn(k, dim, generator=generator).requires_grad_(),
        TAU_S,
    )
    teacher = TeacherSide(torch.randn(n, dim), torch.randn(k, dim), torch.zeros(k), TAU_T)
    with PeakMemory() as chunked:
        loss = prototype_cross_entropy(student, teacher)
        loss.backward()
    stated = 2 * CHUNK_ELEMENTS * 4 + 4 * (n + k) * dim * 2
    assert chunked.largest <= CHUNK_ELEMENTS * 4 < n * k * 4
    assert chunked.peak <= 1.05 * stated
    with PeakMemory() as plain:
        q = ((teacher.tokens @ teacher.prototypes.T) / TAU_T).softmax(-1)
        log_p = ((student.tokens @ student.prototypes.T) / TAU_S).log_softmax(-1)
        whole = -(q * log_p).sum(-1).mean()
        whole.backward()
    assert plain.peak > 3 * n * k * 4  # so the measure sees what it should
    assert chunked.peak < plain.peak / 3
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


def test_balancing_a_batch_of_all_tokens_is_as_frugal() -> None:
    tokens, prototypes = torch.randn(128, 4), torch.randn(131_072, 4)
    with PeakMemory() as memory:
        sinkhorn_centre(tokens, prototypes, 1.0, iterations=2)
    assert memory.peak <= 4.1 * CHUNK_ELEMENTS * 4


def test_the_module_balances_by_batch_or_by_the_given_centre() -> None:
    student, teacher = sides(dtype=torch.float32)
    arguments = (student.tokens, student.prototypes, teacher.tokens, teacher.prototypes, teacher.centre, TAU_T)
    frozen = DINO("head", student_temperature=TAU_S)(*arguments)
    assert frozen.item() == pytest.approx(reference(student, teacher)[0], abs=1e-5)
    balanced = teacher._replace(centre=sinkhorn_centre(teacher.tokens, teacher.prototypes, TAU_T))
    batch = IBOT("head", centring="sinkhorn", student_temperature=TAU_S)(*arguments)
    assert batch.item() == pytest.approx(reference(student, balanced)[0], abs=1e-5)
    assert abs(batch.item() - frozen.item()) > 0.01
    many = torch.randn(1000, 9)
    with pytest.raises(ValueError, match="at least 31"):
        DINO("head", centring="sinkhorn")(
            student.tokens[:4], torch.randn(1000, 6), teacher.tokens[:4], many, torch.zeros(1000), TAU_T
        )


def test_a_share_of_the_patches_is_equally_many_of_each_image() -> None:
    torch.manual_seed(0)
    rows = IBOT("head", share=0.25).sample(6, 16)
    assert rows is not None
    assert torch.equal(torch.bincount(rows // 16, minlength=6), torch.full((6,), 4))
    assert len(rows.unique()) == 24
    again = IBOT("head", share=0.25).sample(6, 16)
    assert again is not None
    assert not torch.equal(rows, again)
    assert IBOT("head").sample(6, 16) is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DINO(), "needs head, the folder that `pathokd prototypes"),
        (lambda: DINO("head", random_prototypes_for_tests=8), "instead of a head"),
        (lambda: DINO("head", student_temperature=0.0), "temperatures must be positive"),
        (lambda: IBOT("head", teacher_temperature=(0.0, 0.07)), "temperatures must be positive"),
        (lambda: IBOT("head", share=0.0), "share must lie in"),
        (lambda: DINO("head", warmup=2.0), "warmup is a share"),
    ],
)
def test_wrong_settings_are_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_sides_that_do_not_fit_are_refused() -> None:
    student, teacher = sides()
    with pytest.raises(ValueError, match="37 tokens and 11 prototypes, the teacher 36"):
        prototype_cross_entropy(student, teacher._replace(tokens=teacher.tokens[1:]))
