"""A checkpoint in shards is whole or none; two processes write one, and one process reads it."""

import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from pathokd.errors import StoreError, WeightsError
from pathokd.models.sharded import (
    META,
    is_checkpoint,
    is_sharded,
    model_shapes,
    read_facts,
    read_shards,
    read_whole,
    sweep_half,
    write_shards,
)


def tensors(step: int) -> dict[str, Any]:
    state = {"net.weight": torch.arange(6.0).reshape(2, 3) + step, "net.half": torch.full((3,), step).bfloat16()}
    return {"state_dict": state, "optimizers": {"0": {"net.weight": {"step": torch.tensor(float(step))}}}}


def same(found: dict[str, Any], step: int) -> bool:
    wanted = tensors(step)["state_dict"]
    state = found["state_dict"]
    return found["global_step"] == step and state.keys() == wanted.keys() and all(
        torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in wanted.items()
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_shards(tensors(1), {"global_step": 1}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_what_is_written_is_read(saved: Path) -> None:
    assert is_sharded(saved)
    assert is_checkpoint(saved)
    assert same(read_whole(saved), 1)
    into = tensors(7)
    read_shards(into, saved)
    assert same({**into, "global_step": 1}, 1)
    assert into["optimizers"]["0"]["net.weight"]["step"] == 1
    assert model_shapes(saved) == {"net.weight": (2, 3), "net.half": (3,)}


def test_the_next_one_takes_its_place_and_sweeps(saved: Path) -> None:
    first = read_facts(saved)["shards"]
    (saved / "left-by-a-kill").mkdir()
    write_shards(tensors(2), {"global_step": 2}, saved)
    assert same(read_whole(saved), 2)
    assert {path.name for path in saved.iterdir()} == {META, read_facts(saved)["shards"]}
    assert not (saved / first).exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["shards", "index", "meta"])
def test_a_kill_at_any_moment_leaves_the_last_one(saved: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    where: Any = {
        "shards": (FileSystemWriter, "write_data"),
        "index": (FileSystemWriter, "finish"),
        "meta": ("pathokd.models.sharded.atomic_path",),
    }[moment]
    fresh = saved.parent / "first.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(*where, kill)
        for path in (saved, fresh):
            with pytest.raises((Killed, StoreError)):
                write_shards(tensors(2), {"global_step": 2}, path)
    assert same(read_whole(saved), 1)
    assert list(fresh.iterdir())  # something lies there, and it is no checkpoint
    assert not is_checkpoint(fresh)
    for path in (saved, fresh):
        shutil.copytree(path, saved.parent / f"swept-{path.name}")
        sweep_half(saved.parent / f"swept-{path.name}")
    assert same(read_whole(saved.parent / "swept-last.ckpt"), 1)
    assert not (saved.parent / "swept-first.ckpt").exists()
    write_shards(tensors(3), {"global_step": 3}, fresh)
    assert same(read_whole(fresh), 3)
    assert len(list(fresh.iterdir())) == 2


def test_what_is_not_ours_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / "other.ckpt/inside").mkdir(parents=True)
    (tmp_path / "other.ckpt/inside/notes.txt").write_text("mine")
    (tmp_path / "file.ckpt").write_text("mine")
    for path in tmp_path.iterdir():
        sweep_half(path)
    assert (tmp_path / "other.ckpt/inside/notes.txt").exists()
    assert (tmp_path / "file.ckpt").exists()


def test_shards_that_are_missing_or_cut_are_refused(saved: Path) -> None:
    inside = saved / read_facts(saved)["shards"]
    shard = next(inside.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"Cannot read .*Copy the checkpoint again"):
        read_whole(saved)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"Cannot read .*Copy the checkpoint again"):
        read_whole(saved)
    shutil.rmtree(inside)
    with pytest.raises(WeightsError, match=r"lacks the shards that its meta\.pt names"):
        read_whole(saved)
    (saved / META).write_bytes(b"half")
    with pytest.raises(WeightsError, match=r"meta\.pt cannot be read"):
        read_facts(saved)


def test_another_model_is_refused_in_a_sentence(saved: Path) -> None:
    for other in ({"net.weight": torch.zeros(2, 4)}, {"net.bias": torch.zeros(3)}):
        with pytest.raises(WeightsError, match="resume with the model it is of") as error:
            read_shards({"state_dict": other}, saved)
        assert "\n" not in str(error.value)


def test_an_index_that_does_something_is_not_unpickled(saved: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    index = saved / read_facts(saved)["shards"] / ".metadata"
    index.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(WeightsError, match=r"is no index of shards \(it names "):
        read_whole(saved)
    with pytest.raises(WeightsError, match="is no index of shards"):
        read_shards(tensors(1), saved)
    index.write_bytes(pickle.dumps({"state_dict": 1}))
    with pytest.raises(WeightsError, match="it holds dict"):
        read_whole(saved)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_is_a_sentence(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(StoreError, match=r"Cannot write .*No space left on device\)\. Free some space"):
        write_shards(tensors(2), {"global_step": 2}, saved)
    assert same(read_whole(saved), 1)


def test_a_disk_that_fills_up_at_the_last_file_is_a_sentence(saved: Path) -> None:
    """A limit on the size of files gives the same error from the same call as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(StoreError, match=r"Cannot write .*meta\.pt: File too large\. Free some space"):
            write_shards(tensors(2), {"global_step": 2, "random": torch.zeros(20_000)}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(read_whole(saved), 1)


# ---------------------------------------------------------------------------- two processes


def as_process(rank: int, folder: Path) -> None:
    """Be one of two that write one checkpoint, and one that is not in one folder."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    mine = tensors(4)
    mine["state_dict"]["net.weight"] = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Shard(0)])
    write_shards(mine, {"global_step": 4}, folder / "both.ckpt")
    again = tensors(9)
    again["state_dict"]["net.weight"] = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    read_shards(again, folder / "both.ckpt")
    local = again["state_dict"]["net.weight"].to_local()
    try:
        write_shards(mine, {}, folder / f"node-{rank}/apart.ckpt")
    except StoreError as error:
        said = str(error)
    torch.save({"local": local, "half": again["state_dict"]["net.half"], "said": said}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_write_and_one_reads(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=250) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.wait()
    found = read_whole(tmp_path / "both.ckpt")
    weight = torch.arange(15.0).reshape(5, 3)
    assert torch.equal(found["state_dict"]["net.weight"], weight)
    inside = tmp_path / "both.ckpt" / found["shards"]
    assert len(list(inside.glob("*.distcp"))) == 2  # each its part
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(torch.cat([part["local"] for part in parts]), weight)
    for part in parts:
        assert torch.equal(part["half"], tensors(4)["state_dict"]["net.half"])
        assert "give --out a folder that all nodes share" in part["said"]
    assert not is_checkpoint(tmp_path / "node-0/apart.ckpt")


if __name__ == "__main__":
    as_process(int(sys.argv[1]), Path(sys.argv[2]))
