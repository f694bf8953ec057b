"""A model on the CPU keeps the memory it frees."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="malloc of another system")

KEPT = """
import ctypes, json, sys
import torch

class Mallinfo2(ctypes.Structure):
    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2

def kept():
    block = torch.ones(64 << 18)
    apart = libc.mallinfo2().hblkhd >= 64 << 20
    del block
    return bool(not apart and libc.mallinfo2().arena >= 64 << 20)

before = kept()
exec(sys.argv[1])
print(json.dumps([before, kept()]))
"""
"""Whether 64 MB, once freed, stay with the process; before and after what the argument does."""


def kept(action: str, **environment: str) -> list[bool]:
    done = subprocess.run(
        [sys.executable, "-c", KEPT, action], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if "undefined symbol: mallinfo2" in done.stderr:
        pytest.skip("this system's malloc is not that of glibc 2.33 or later")
    assert done.returncode == 0, done.stderr
    found: list[bool] = json.loads(done.stdout.splitlines()[-1])
    return found


ASK = "from pathokd.models.device import keep_freed_memory; keep_freed_memory(torch.device({device!r}))"
RUN = """
from pathokd.cli.main import main
assert main({words}) == 0
"""


def test_freed_memory_is_kept_where_nobody_says_otherwise() -> None:
    assert kept(ASK.format(device="cpu")) == [False, True]
    assert kept(ASK.format(device="cuda")) == [False, False]
    assert kept(ASK.format(device="cpu"), MALLOC_TRIM_THRESHOLD_="131072") == [False, False]


def test_a_training_on_the_cpu_keeps_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(recipe))
    words = ["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"), "--trainer.max_steps", "1"]
    assert kept(RUN.format(words=words)) == [False, True]


def test_a_verb_with_a_model_on_the_cpu_keeps_it(tiny_teacher: Path, packed: Path, tmp_path: Path) -> None:
    words = ["cache", str(tiny_teacher), str(packed), "--precision", "fp32", "--out", str(tmp_path / "targets")]
    assert kept(RUN.format(words=[*words, "--device", "cpu"])) == [False, True]
