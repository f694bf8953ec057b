"""Two processes compute what one does, whole or sharded: gloo on a CPU, through the command line."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pathokd.cli.main import main
from pathokd.distill.strategy import shards_on_cpu
from pathokd.models.sharded import is_checkpoint, is_sharded, read_whole

WEIGHTS = 2e-5
"""Largest difference allowed between weights of order 1: fp32 sums in another order, six steps of AdamW at 1e-3."""
LOGGED = 1e-4
"""Relative difference allowed between logged numbers."""


def with_processes(recipe: dict[str, Any], processes: int) -> dict[str, Any]:
    """The recipe on so many processes, with the same global batch of 8."""
    recipe = copy.deepcopy(recipe)
    recipe["data"]["batch_size"] = 8 // processes
    recipe["trainer"] |= {
        "devices": processes,
        "strategy": recipe["trainer"].get("strategy", "ddp") if processes > 1 else "auto",
    }
    return recipe


def start(recipe: dict[str, Any], out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`pathokd fit` in a process group of its own."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "pathokd.cli", "fit", "--config", str(config), "--out", str(out), *more]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code; a run that hangs is killed."""
    try:
        return process.wait(timeout=250)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def run(recipe: dict[str, Any], out: Path, *more: str) -> dict[str, Any]:
    """Run to the end; the last checkpoint."""
    assert end_of(start(recipe, out, *more)) == 0, out.with_suffix(".log").read_text()
    checkpoint: dict[str, Any] = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


@pytest.fixture
def gathered(recipe: dict[str, Any], tiny_prototypes: Path) -> dict[str, Any]:
    """All that looks beyond its own tile: statistics, solved projectors, KoLeo, prototypes, clipping, validation."""
    student = recipe["model"]["student"]["model_args"]
    # Stochastic depth draws other noise on each process. A bias of keys changes nothing, so its gradient is rounding,
    # which AdamW makes steps of.
    student |= {"drop_path_rate": 0.0, "qkv_bias": False}
    head = {"head": str(tiny_prototypes)}
    recipe["model"]["objectives"] += [
        {"loss": {"class_path": "pathokd.losses.KoLeo"}, "weight": 0.1, "view": "student"},
        {"loss": {"class_path": "pathokd.losses.DINO", "init_args": {**head, "diagonal": True}}, "view": "student"},
        {
            "loss": {"class_path": "pathokd.losses.IBOT", "init_args": {**head, "centring": "sinkhorn"}},
            "tokens": "patches",
        },
    ]
    second = {**recipe["model"]["student"], "model_args": {**student, "depth": 1}, "seed": 1}
    recipe["model"] |= {"fidelity_tiles": 13, "standardize_steps": 3, "more_students": {"small": second}}
    recipe["model"]["projector"] = {"solve_tiles": 16}
    recipe["data"] |= {"val_batch_size": 3, "workers": 0}
    recipe["trainer"] |= {"gradient_clip_val": 0.1, "log_every_n_steps": 1}
    return recipe


def logged(out: Path) -> pd.DataFrame:
    table = pd.read_csv(next((out / "metrics").rglob("metrics.csv")))
    return table.drop(columns="train/data_wait").groupby("step").first()  # a time, no result


@pytest.mark.timeout(600)
def test_two_processes_train_as_one_does(gathered: dict[str, Any], tmp_path: Path) -> None:
    one = run(with_processes(gathered, 1), tmp_path / "one")
    for strategy in ("ddp", "fsdp2") if shards_on_cpu() else ("ddp",):
        out = tmp_path / strategy
        gathered["trainer"]["strategy"] = strategy
        two = run(with_processes(gathered, 2), out)
        assert one["global_step"] == two["global_step"] >= 6
        assert one["state_dict"].keys() == two["state_dict"].keys()
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(two["state_dict"][name], value, rtol=WEIGHTS, atol=WEIGHTS, msg=name)
        a, b = logged(tmp_path / "one"), logged(out)
        assert list(a) == list(b)
        assert {"train/loss", "val/cka", "val/knn_overlap", "val/cosine_patches", "val/small/kl_cls"} <= {*a}
        pd.testing.assert_frame_equal(a, b, rtol=LOGGED, atol=LOGGED)
        best = [torch.load(folder / "checkpoints/best.ckpt", weights_only=True) for folder in (tmp_path / "one", out)]
        assert best[0]["epoch"] == best[1]["epoch"]


def on_registered_pairs(recipe: dict[str, Any], tiles: Path) -> dict[str, Any]:
    """Batches of places, found again under the other condition, and relations kept beside it."""
    recipe["data"] |= {"tiles": str(tiles), "registered": {"case": "case", "conditions": ["stain", "scanner"]}}
    recipe["model"]["objectives"] += [
        {"loss": {"class_path": "pathokd.losses.RegisteredInfoNCE"}, "view": "student", "weight": 0.3},
        {"loss": {"class_path": "pathokd.losses.RKD"}, "view": "student", "share": 0.2},
    ]
    return recipe


@pytest.mark.timeout(600)
def test_registered_pairs_train_two_processes_as_one(
    recipe: dict[str, Any], registered_packed: Path, tmp_path: Path
) -> None:
    on_registered_pairs(recipe, registered_packed)
    recipe["model"]["student"]["model_args"] |= {"drop_path_rate": 0.0, "qkv_bias": False}  # as in `gathered`
    recipe["data"]["workers"] = 0
    recipe["trainer"] |= {"max_epochs": -1, "max_steps": 6, "log_every_n_steps": 1}
    one, two = (run(with_processes(recipe, n), tmp_path / str(n)) for n in (1, 2))
    assert one["global_step"] == two["global_step"] == 6
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=WEIGHTS, atol=WEIGHTS, msg=name)
    a, b = logged(tmp_path / "1"), logged(tmp_path / "2")
    assert {"train/cls_registeredinfonce@student", "train/weight/cls_rkd@student", "val/cosine_cls"} <= {*a}
    assert (a["train/cls_registeredinfonce@student"].dropna() > 0.1).all()  # 4 places: log 4 at first
    pd.testing.assert_frame_equal(a, b, rtol=LOGGED, atol=LOGGED)


@pytest.fixture
def noisy(recipe: dict[str, Any], tiny_prototypes: Path) -> dict[str, Any]:
    """On two processes, with noise that each draws for itself: 12 steps in three epochs."""
    loss = {"class_path": "pathokd.losses.IBOT", "init_args": {"head": str(tiny_prototypes), "share": 0.5}}
    recipe["model"]["objectives"].append({"loss": loss, "tokens": "patches"})
    assert recipe["model"]["student"]["model_args"]["drop_path_rate"] > 0
    recipe["data"]["workers"] = 0
    recipe["trainer"]["accumulate_grad_batches"] = 1
    return with_processes(recipe, 2)


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int) -> int:
    """Wait for the checkpoint of `step` or a later one; which."""
    last = out / "checkpoints/last.ckpt"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed: " + out.with_suffix(".log").read_text()
        if is_checkpoint(last):
            reached = int(torch.load(last / "meta.pt" if is_sharded(last) else last, weights_only=True)["global_step"])
            if reached >= step:
                return reached
        time.sleep(0.01)
    raise AssertionError("no checkpoint came")


def second_process(first: int) -> int:
    """The process id of rank 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == first and b"LOCAL_RANK=1" in (folder / "environ").read_bytes():
                return int(folder.name)
        except (OSError, ValueError):  # gone meanwhile
            continue
    raise AssertionError(f"process {first} has no second one")


@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the second process in /proc")
@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "pairs"])
def test_one_process_or_all_killed_and_resumed_is_exact(
    noisy: dict[str, Any], registered_packed: Path, registered: bool, tmp_path: Path
) -> None:
    if registered:
        on_registered_pairs(noisy, registered_packed)
        noisy["trainer"] |= {"max_epochs": -1, "max_steps": 12}
    whole = run(noisy, tmp_path / "whole")
    out, often = tmp_path / "killed", ("--checkpoint_every", "1")
    first = start(noisy, out, *often)
    reached = wait_for_step(first, out, 2)
    os.kill(second_process(first.pid), signal.SIGKILL)
    assert end_of(first) != 0  # the other one does not wait for ever
    again = start(noisy, out, *often, "--resume", "true")
    later = wait_for_step(again, out, max(reached + 1, 6))
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    assert 2 <= reached < later < 12
    resumed = run(noisy, out, "--resume", "true")
    assert resumed["global_step"] == whole["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    states = [[state["cpu"] for state in end["pathokd"]["random"]] for end in (whole, resumed)]
    assert len(states[0]) == 2
    assert not torch.equal(*states[0])  # each process has noise of its own
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("end", [{"max_steps": 3}, {"max_epochs": 1}], ids=["mid-epoch", "between epochs"])
def test_another_number_of_processes_is_refused(noisy: dict[str, Any], end: dict[str, int], tmp_path: Path) -> None:
    noisy["trainer"] |= end
    assert run(noisy, tmp_path / "run")["pathokd"]["processes"] == 2
    noisy["trainer"] |= {"max_epochs": 3, "max_steps": -1}
    alone = with_processes(noisy, 1)
    assert end_of(start(alone, tmp_path / "run", "--resume", "true")) == 1
    said = (tmp_path / "run.log").read_text()
    assert "was written by a training of 2 process(es), and this is one of 1" in said
    assert "trainer.devices x trainer.num_nodes = 2" in said
    assert "Traceback" not in said


IN_SHARDS = {
    "class_path": "pathokd.distill.strategy.FullyShardedStrategy",
    "init_args": {"sharded_checkpoints": True},
}


@pytest.mark.usefixtures("cpu_shards")
@pytest.mark.timeout(600)
def test_checkpoints_in_shards_are_exported_and_refused_to_others(
    noisy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy["trainer"] |= {"strategy": IN_SHARDS, "max_steps": 3}
    out, config = tmp_path / "run", tmp_path / "run.yaml"
    assert end_of(start(noisy, out)) == 0, out.with_suffix(".log").read_text()
    for name in ("last", "best"):
        folder = out / f"checkpoints/{name}.ckpt"
        assert is_sharded(folder)
        assert len(list(folder.glob("*/*.distcp"))) == 2
        assert main(["export", str(out), "--which", name, "--out", str(tmp_path / name)]) == 0
    weight = load_file(tmp_path / "last/model.safetensors")["patch_embed.proj.weight"]
    found = read_whole(out / "checkpoints/last.ckpt")
    assert torch.equal(weight, found["state_dict"]["students.student.ema.model.encoder.model.patch_embed.proj.weight"])
    assert found["global_step"] == 3
    # One process validates what two trained; it does not go on with it, and takes no half folder for a checkpoint.
    config.write_text(yaml.safe_dump(with_processes(noisy, 1)), encoding="utf-8")
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--out", str(out), "--resume", "true"]) == 1
    assert "was written by a training of 2 process(es), and this is one of 1" in capsys.readouterr().err
    assert main(["validate", "--config", str(config), "--out", str(out)]) == 0
    for name in ("last", "best"):
        (out / f"checkpoints/{name}.ckpt/meta.pt").unlink()
    assert main(["validate", "--config", str(config), "--out", str(out)]) == 1
    assert main(["export", str(out), "--out", str(tmp_path / "none")]) == 1
    # A new run sweeps the half ones away, and may write files in their place.
    assert main(["fit", "--config", str(config), "--out", str(out)]) == 0
    assert (out / "checkpoints/last.ckpt").is_file()


@pytest.mark.usefixtures("cpu_shards")
@pytest.mark.parametrize("form", ["fsdp2", IN_SHARDS], ids=["file", "shards"])
def test_what_a_sharded_run_does_not_have_is_not_left_out(noisy: dict[str, Any], form: Any, tmp_path: Path) -> None:
    """Neither torch nor Lightning minds weights of a checkpoint that nobody asks for."""
    noisy["trainer"] |= {"devices": 1, "strategy": form, "max_steps": 2}
    out, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    assert end_of(start(noisy, out)) == 0, out.with_suffix(".log").read_text()
    fewer = {**noisy, "model": {**noisy["model"], "objectives": noisy["model"]["objectives"][:1]}}
    assert end_of(start(fewer, out, "--resume", "true")) == 1
    assert "of other networks: students.student.net.heads.tiny__patches" in out.with_suffix(".log").read_text()
    if last.is_file():
        last.write_bytes(last.read_bytes()[:20_000])
        assert end_of(start(noisy, out, "--resume", "true")) == 1
        assert "last.ckpt cannot be read as a checkpoint" in out.with_suffix(".log").read_text()
    assert "Traceback" not in out.with_suffix(".log").read_text()


@pytest.mark.usefixtures("cpu_shards")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_shards_is_killed_and_resumed_exactly(noisy: dict[str, Any], tmp_path: Path) -> None:
    noisy["trainer"]["strategy"] = "fsdp2"
    whole = run(noisy, tmp_path / "whole")
    out, last = tmp_path / "killed", tmp_path / "killed/checkpoints/last.ckpt"
    assert end_of(start({**noisy, "trainer": {**noisy["trainer"], "max_steps": 2}}, tmp_path / "file")) == 0
    noisy["trainer"]["strategy"] = IN_SHARDS
    reached = [0]
    for more in ([], ["--resume", "true"]):
        process = start(noisy, out, "--checkpoint_every", "1", *more)
        reached.append(wait_for_step(process, out, reached[-1] + 3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert read_whole(last)["global_step"] >= reached[-1]
    assert reached[-1] < 12
    assert end_of(start(noisy, out, "--resume", "true")) == 0, out.with_suffix(".log").read_text()
    resumed = read_whole(last)
    assert resumed["global_step"] == 12
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert len(list(last.iterdir())) == 2  # what the kills left is swept away
    # A run keeps the form of its checkpoints.
    noisy["trainer"]["strategy"] = "ddp"
    assert end_of(start(noisy, out, "--resume", "true")) != 0
    assert "This checkpoint lies in shards and this run would write whole files" in out.with_suffix(".log").read_text()
    noisy["trainer"]["strategy"] = IN_SHARDS
    assert end_of(start(noisy, tmp_path / "file", "--resume", "true")) != 0
    assert "This checkpoint is one file and this run would write shards" in (tmp_path / "file.log").read_text()


@pytest.mark.usefixtures("cpu_shards")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sharded_run_is_resumed_and_exported(noisy: dict[str, Any], tmp_path: Path) -> None:
    noisy["trainer"]["strategy"] = "fsdp2"
    whole = run(noisy, tmp_path / "whole")
    out = tmp_path / "killed"
    first = start(noisy, out, "--checkpoint_every", "1")
    assert 2 <= wait_for_step(first, out, 2) < 12
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    resumed = run(noisy, out, "--resume", "true")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert main(["export", str(out), "--out", str(tmp_path / "student")]) == 0
    exported = load_file(tmp_path / "student/model.safetensors")
    assert exported["patch_embed.proj.weight"].shape == (16, 3, 8, 8)


@pytest.mark.usefixtures("cpu_shards")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_sharded_student_trains_as_a_plain_one(gathered: dict[str, Any], tmp_path: Path) -> None:
    gathered["trainer"]["strategy"] = "fsdp2"
    plain = run(with_processes(gathered, 1), tmp_path / "plain")
    gathered["model"]["compile"] = True
    compiled = run(with_processes(gathered, 2), tmp_path / "compiled")
    assert plain["state_dict"].keys() == compiled["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(compiled["state_dict"][name], value, rtol=WEIGHTS, atol=WEIGHTS, msg=name)
    pd.testing.assert_frame_equal(logged(tmp_path / "plain"), logged(tmp_path / "compiled"), rtol=LOGGED, atol=LOGGED)


def test_other_strategies_are_refused(noisy: dict[str, Any], tmp_path: Path) -> None:
    noisy["trainer"]["strategy"] = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    assert end_of(start(noisy, tmp_path / "run")) != 0
    said = (tmp_path / "run.log").read_text()
    assert "trainer.strategy is ModelParallelStrategy, which pathokd does not train with: set it to ddp" in said


def test_torchrun_with_processes_that_do_not_know_of_each_other_is_refused(
    noisy: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "alone.yaml"
    config.write_text(yaml.safe_dump(with_processes(noisy, 1)), encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pathokd.cli",
    ]
    done = subprocess.run(
        [*launch, "fit", "--config", str(config), "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode != 0
    assert "torchrun started 2 processes and the trainer counts 1" in done.stderr
    assert not list((tmp_path / "run").rglob("*.ckpt"))
