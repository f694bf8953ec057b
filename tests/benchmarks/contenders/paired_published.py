"""A straightforward re-creation of the published way, fp32 in NumPy: all 2n tiles of each pair with all 2n.

Usage: python paired_published.py JOB.json, written by `test_paired.py`.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from paired_memory import peak_bytes, resident_bytes


def score(a: np.ndarray, b: np.ndarray, ks: list[int]) -> tuple[float, list[float]]:
    """Mean cosine of partners, from the n by n matrix, and top-k from the 2n by 2n one."""
    n = len(a)
    norms = np.linalg.norm(a, axis=1, keepdims=True) * np.linalg.norm(b, axis=1, keepdims=True).T
    cosine = float(np.diag(a @ b.T / norms).mean())
    both = np.concatenate([a, b])
    norm = np.linalg.norm(both, axis=1, keepdims=True)
    similarity = both @ both.T / (norm * norm.T)
    # The first in rank is taken to be the tile itself.
    nearest = np.argpartition(-similarity, range(1, max(ks) + 1), axis=1)[:, 1 : max(ks) + 1]
    partner = np.concatenate([np.arange(n, 2 * n), np.arange(n)])
    found = nearest == partner[:, None]
    return cosine, [float(found[:, :k].any(axis=1).mean()) for k in ks]


def main(job: dict) -> None:
    np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)  # loads the library's kernels
    before = resident_bytes()
    start = time.perf_counter()
    values = {}
    for first, second in itertools.combinations(job["slides"], 2):
        values[f"{first}-{second}"] = score(np.load(job["slides"][first]), np.load(job["slides"][second]), job["k"])
    facts = {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - before, "values": values}
    Path(job["out"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
