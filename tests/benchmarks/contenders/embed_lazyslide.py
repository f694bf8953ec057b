"""LazySlide's `feature_extraction` as its documentation has it, with a constant encoder and as many workers as ours.

Usage: LAZYSLIDE_PYTHON embed_lazyslide.py JOB.json, written by `test_embedding.py`. Finding tissue is outside the
clock; features stay in the object (LazySlide writes only when asked).
"""

import json
import sys
import time
from pathlib import Path

import lazyslide as zs
import torch
from torchvision.transforms import v2
from wsidata import open_wsi


class Null(torch.nn.Module):
    """The same vector for every tile."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_ones(len(images), self.width)


def main(job: dict) -> None:
    wsi = open_wsi(job["slide"], store=None)
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, 224, mpp=job["mpp"])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    start = time.perf_counter()
    zs.tl.feature_extraction(
        wsi,
        Null(job["width"]),
        model_name="null",
        transform=transform,
        device="cpu",
        batch_size=job["batch_size"],
        num_workers=job["workers"],
        pbar=False,
    )
    seconds = time.perf_counter() - start
    tiles = int(wsi.tables["null_tiles"].n_obs)
    Path(job["out"]).write_text(json.dumps({"tiles": tiles, "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
