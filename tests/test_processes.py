"""What two processes tell each other, against the sums over all rows in float64.

Run this file as a script to be one of the processes; the test runs it so.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pathokd.distill.balance import Balance
from pathokd.distill.objective import Objective
from pathokd.losses import RKD, Consistency, Cosine, KoLeo, RegisteredInfoNCE
from pathokd.losses.assignment import sinkhorn_centre, token_count
from pathokd.models.ridge import RidgeSums
from pathokd.models.standardize import Standardizer
from pathokd.processes import gather_equal, gather_objects, gather_rows, mean_over_processes, process_rank, world_size

STEPS = ((5, 11), (0, 7), (6, 6))
"""Rows that each of the two processes brings, step by step."""
PARTS = ((1.0, 0.5), (3.0, 0.1))
"""What two terms of a loss come to in each of them."""


def tiles() -> torch.Tensor:
    """Rows of very different means and scales, far from zero."""
    x = torch.randn(sum(map(sum, STEPS)), 4, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor([1.0, 1e-3, 50.0, 1.0]) + torch.tensor([100.0, 1.0, -3.0, 0.0])


def share(rank: int) -> list[torch.Tensor]:
    """Rows of one process, step by step."""
    parts = torch.split(tiles(), [rows for step in STEPS for rows in step])
    return list(parts[rank::2])


def relations(x: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
    """Losses among the tiles of a batch, of some rows of the whole batch of 12."""
    place, condition = torch.arange(12) // 2 % 3, torch.arange(12) % 2
    y = x.detach().square()
    return {
        "infonce": RegisteredInfoNCE()(x, place[rows], condition[rows]),
        "rkd": RKD()(x, y),
        "consistency": Consistency(centred=True)(x, y),
    }


def ridge_sums(parts: list[torch.Tensor]) -> RidgeSums:
    """Of two columns on the other two, halves by the rows' own sign."""
    sums = RidgeSums(2, 2, torch.device("cpu"))
    for rows in parts:
        half = rows[:, 0] > 100
        for which in (0, 1):
            sums.add(rows[half == which][:, [0, 2]], rows[half == which][:, [1, 3]], which)
    return sums


def as_process(rank: int, folder: Path) -> None:
    """Be one of two, and write down what came of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    statistics = Standardizer(4)
    for rows in share(rank):
        statistics.update(rows)
    weight = torch.eye(4).requires_grad_()
    loss = KoLeo()(share(rank)[2] @ weight)
    loss.backward()
    among = torch.eye(4).requires_grad_()
    values = relations(share(rank)[2] @ among, slice(6 * rank, 6 * rank + 6))
    torch.stack(list(values.values())).sum().backward()
    prototypes = torch.nn.functional.normalize(tiles()[:3] - 50, dim=-1)
    balance = Balance([Objective(Cosine()), Objective(RKD(), share=0.5)])
    balance.update(torch.tensor(PARTS[rank]))
    regression = ridge_sums(share(rank)).solve()
    found: dict[str, Any] = {
        "ridge": (regression.weight, regression.bias, regression.explained, regression.ridge),
        "statistics": statistics.state_dict(),
        "koleo": loss.detach(),
        "gradient": mean_over_processes(weight.grad),  # type: ignore[arg-type]
        "relations": mean_over_processes(torch.stack(list(values.values()))),
        "relations_gradient": mean_over_processes(among.grad),  # type: ignore[arg-type]
        "centre": sinkhorn_centre(share(rank)[2].double() / 50, prototypes.double(), 0.1),
        "tokens": token_count(share(rank)[2]),
        "weights": balance.now(),
        "objects": gather_objects({"rank": rank}),
        "equal": gather_equal(share(rank)[2]),
        "who": (process_rank(), world_size()),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=250) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_statistics_are_those_of_all_rows(found: list[dict[str, Any]]) -> None:
    x = tiles().numpy().astype(np.float64)
    for mine in found:
        statistics = mine["statistics"]
        np.testing.assert_allclose(statistics["_mean64"], x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics["_m2"], x.var(0) * len(x), rtol=1e-12)
        np.testing.assert_allclose(statistics["std"], x.std(0, ddof=1), rtol=1e-6)
        assert statistics["count"] == len(x)
    for name, value in found[0]["statistics"].items():
        assert torch.equal(value, found[1]["statistics"][name])


def test_each_process_by_itself_would_come_to_others(found: list[dict[str, Any]]) -> None:
    alone = Standardizer(4)
    for rows in share(0):
        alone.update(rows)
    np.testing.assert_allclose(alone.mean, torch.cat(share(0)).double().mean(0), rtol=1e-6)
    together = found[0]["statistics"]
    assert ((alone.mean - together["mean"]).abs() > 0.01 * together["std"]).all()


def test_koleo_and_its_gradient_are_those_of_the_whole_batch(found: list[dict[str, Any]]) -> None:
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    whole = torch.cat([share(0)[2], share(1)[2]]).double()
    unit = torch.nn.functional.normalize(whole @ weight, dim=-1)
    nearest = (unit @ unit.T - 2 * torch.eye(len(unit))).argmax(1)
    loss = -(unit - unit[nearest]).norm(dim=-1).log().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    alone = KoLeo()(share(0)[2])
    for mine in found:
        assert mine["koleo"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert abs(mine["koleo"] - alone) > 0.01
        torch.testing.assert_close(mine["gradient"].double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_what_lies_between_tiles_is_that_of_the_whole_batch(found: list[dict[str, Any]]) -> None:
    among = torch.eye(4, dtype=torch.float64).requires_grad_()
    whole = torch.cat([share(0)[2], share(1)[2]]).double()
    values = torch.stack(list(relations(whole @ among, slice(0, 12)).values()))
    values.sum().backward()  # type: ignore[no-untyped-call]
    alone = torch.stack(list(relations(whole[:6].float(), slice(0, 6)).values()))
    for mine in found:
        torch.testing.assert_close(mine["relations"].double(), values.detach(), rtol=1e-4, atol=1e-6)
        assert ((mine["relations"] - alone).abs() > 0.001).all()
        torch.testing.assert_close(mine["relations_gradient"].double(), among.grad, rtol=1e-3, atol=1e-5)


def test_sinkhorn_balances_the_tokens_of_both(found: list[dict[str, Any]]) -> None:
    prototypes = torch.nn.functional.normalize(tiles()[:3] - 50, dim=-1)
    whole = torch.cat([share(0)[2], share(1)[2]]).double() / 50
    expected = sinkhorn_centre(whole, prototypes.double(), 0.1)
    for mine in found:
        torch.testing.assert_close(mine["centre"], expected, rtol=0, atol=1e-12)
        assert mine["tokens"] == len(whole) == 12


def test_a_regression_is_that_of_all_rows(found: list[dict[str, Any]]) -> None:
    whole = ridge_sums([*share(0), *share(1)]).solve()
    for mine in found:
        weight, bias, explained, ridge = mine["ridge"]
        torch.testing.assert_close(weight, whole.weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bias, whole.bias, rtol=1e-9, atol=1e-12)
        assert (explained, ridge) == (pytest.approx(whole.explained), whole.ridge)


def test_a_term_keeps_its_share_of_what_both_saw(found: list[dict[str, Any]]) -> None:
    first, second = np.mean(PARTS, axis=0)
    for mine in found:
        assert mine["weights"].tolist() == pytest.approx([1, first / second], rel=1e-5)


def test_everyone_hears_everyone_in_the_order_of_ranks(found: list[dict[str, Any]]) -> None:
    for rank, mine in enumerate(found):
        assert mine["objects"] == [{"rank": 0}, {"rank": 1}]
        assert mine["who"] == (rank, 2)
        assert all(torch.equal(x, share(r)[2]) for r, x in enumerate(mine["equal"]))


def test_alone_nothing_changes() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x
    assert gather_equal(x) == [x]
    assert gather_objects(7) == [7]
    assert torch.equal(mean_over_processes(x), x)
    assert (process_rank(), world_size()) == (0, 1)


if __name__ == "__main__":
    as_process(int(sys.argv[1]), Path(sys.argv[2]))
