"""The yardstick for embedding: a bare loop of forward passes over tiles that lie decoded in memory.

Usage: python embed_bare.py JOB.json, written by `test_embedding.py`. Nothing is read or written while the clock runs.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch


def main(job: dict) -> None:
    tiles = np.load(job["tiles"])
    model = timm.create_model(job["encoder"], num_classes=0).eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    vectors = []
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(tiles), job["batch_size"]):
            batch = torch.from_numpy(tiles[first : first + job["batch_size"]]).permute(0, 3, 1, 2).contiguous()
            vectors.append(model.forward_features((batch.float() / 255 - mean) / std)[:, 0].numpy())
    features = np.concatenate(vectors)
    seconds = time.perf_counter() - start
    Path(job["out"]).write_text(json.dumps({"tiles": len(features), "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
