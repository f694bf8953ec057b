"""The SLURM recipe, run by bash with two processes on this machine; srun and scontrol are stand-ins."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

SCRIPT = Path(__file__).parents[2] / "configs/slurm/fit.sbatch"
TASKS = 2
SRUN = """#!/bin/bash
# What srun tells its tasks, as far as Lightning and pathokd read it; the batch shell is not of their group.
shift  # --kill-on-bad-exit
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS setsid "$@" &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job with `TASKS` tasks on this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.log\n',
        "pathokd": f'#!/bin/bash\nexec {sys.executable} -m pathokd.cli "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NAME": "pathokd",
        "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000),  # Lightning makes a port of it
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": str(TASKS),
        "SLURM_NTASKS_PER_NODE": str(TASKS),
        "RECIPE": str(tmp_path / "recipe.yaml"),
        "OUT": str(tmp_path / "run"),
    }


def sbatch(cluster: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *more]
    return subprocess.run(
        command, env=cluster, capture_output=True, text=True, timeout=400, check=False, start_new_session=True
    )


def test_it_says_what_it_is_for() -> None:
    text = SCRIPT.read_text()
    assert all(f"# {word}:" in text for word in ("Aim", "Command", "Hardware", "Expected"))
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_a_recipe_must_be_named(cluster: dict[str, str]) -> None:
    del cluster["RECIPE"]
    done = sbatch(cluster)
    assert done.returncode != 0
    assert "name a recipe" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_ran_out_of_time_queues_again_and_goes_on(
    cluster: dict[str, str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["trainer"]["accumulate_grad_batches"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    told = {"class_path": "told.Told", "init_args": {"number": 15, "step": 3}}
    first = sbatch(cluster, f"--trainer.callbacks+={yaml.safe_dump(told)}")
    assert "stopped by SIGTERM after step 10;" in first.stderr, first.stderr
    assert first.returncode == 143
    assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", cluster["SLURM_JOB_ID"]]
    second = sbatch(cluster)
    assert second.returncode == 0, second.stderr
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    assert checkpoint["pathokd"]["processes"] == TASKS
    assert len((tmp_path / "scontrol.log").read_text().splitlines()) == 1
