"""hs2p's own stream of tiles (regions of many tiles at once, one thread), batches, a constant encoder, one HDF5 file.

Usage: HS2P_PYTHON embed_hs2p.py JOB.json, written by `test_embedding.py`. Finding tissue is outside the clock.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from hs2p import SegmentationConfig, SlideSpec, TilingConfig, tile_slide
from hs2p.wsi.streaming import iter_tile_arrays_from_result


def main(job: dict) -> None:
    result = tile_slide(
        SlideSpec(sample_id="slide", image_path=Path(job["slide"])),
        tiling=TilingConfig(
            backend="openslide",
            requested_spacing_um=job["mpp"],
            requested_tile_size_px=224,
            tolerance=0.07,
            overlap=0.0,
        ),
        segmentation=SegmentationConfig(method="hsv", downsample=16),
    )
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    side = int(result.read_tile_size_px)
    vectors: list[np.ndarray] = []
    start = time.perf_counter()
    stream = iter_tile_arrays_from_result(result=result, num_workers=job["workers"])
    with torch.inference_mode():
        while tiles := list(itertools.islice(stream, job["batch_size"])):
            batch = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
            if side != 224:
                batch = torch.nn.functional.interpolate(batch, size=(224, 224), mode="bilinear", antialias=True)
            batch = (batch - mean) / std
            vectors.append(torch.ones(len(batch), job["width"]).numpy())
    with h5py.File(job["features"], "w") as file:
        file["features"] = np.concatenate(vectors)
        file["coords"] = np.stack([result.x, result.y], 1)
    seconds = time.perf_counter() - start
    Path(job["out"]).write_text(json.dumps({"tiles": sum(map(len, vectors)), "seconds": seconds, "read_px": side}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
