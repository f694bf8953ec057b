"""`compare_conditions` over the slides of a job.

Usage: python paired_ours.py JOB.json, written by `test_paired.py`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from paired_memory import peak_bytes, resident_bytes

from pathokd.metrics.conditions import compare_conditions


def main(job: dict) -> None:
    list(compare_conditions(["a", "b"], lambda _: np.eye(64, dtype=np.float32), [1]))  # loads the library's kernels
    before = resident_bytes()
    start = time.perf_counter()
    found = list(compare_conditions(list(job["slides"]), lambda name: np.load(job["slides"][name]), job["k"]))
    seconds = time.perf_counter() - start
    values = {f"{score.first}-{score.second}": (score.cosine, score.topk) for score in found}
    tied = {f"{score.first}-{score.second}": score.tied for score in found}
    facts = {"seconds": seconds, "bytes": peak_bytes() - before, "values": values, "tied": tied}
    Path(job["out"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
