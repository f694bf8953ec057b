"""`embed_slides`, whole: planning, opening, reading, the model, and HDF5 files on the disk with fsync.

Usage: python embed_ours.py JOB.json, written by `test_embedding.py`. The model is built before the clock starts.
"""

import json
import sys
import time
from pathlib import Path

import torch

from pathokd.embed import embed_slides
from pathokd.models import Encoder, StudentSpec, build_student
from pathokd.models.device import keep_freed_memory


def null_encoder(width: int) -> Encoder:
    """Takes and normalises tiles like any encoder, and returns the same vector for all."""
    args = {"depth": 1, "embed_dim": width, "num_heads": 6}
    encoder = build_student(StudentSpec("vit_tiny_patch16_224", args, image_px=224, mpp=0.5))
    encoder.model.forward_features = lambda pixels: torch.ones(len(pixels), 1 + 14 * 14, width)
    return encoder


def main(job: dict) -> None:
    keep_freed_memory(torch.device("cpu"))  # as `pathokd embed` does
    if job["encoder"] == "null":
        encoder = null_encoder(job["width"])
    else:
        encoder = build_student(StudentSpec(job["encoder"], image_px=224, mpp=0.5))
    start = time.perf_counter()
    summary = embed_slides(
        encoder, job["manifest"], job["features"], batch_size=job["batch_size"], workers=job["workers"], overwrite=True
    )
    seconds = time.perf_counter() - start
    facts = {"tiles": int(summary["n_tiles"].sum()), "seconds": seconds, "failed": int((summary.status != "ok").sum())}
    parts = {name: float(summary[name].sum()) for name in ("wait_s", "preprocess_s", "encode_s", "read_s")}
    Path(job["out"]).write_text(json.dumps({**facts, **parts}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
