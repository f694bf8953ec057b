"""Run in a process of its own by test_fuzz.py: native code may crash or hang on what it is given here.

Usage: python fuzz_worker.py KIND FOLDER, with KIND `slides` or `features`; prints NAME before and its outcome after.
"""

import faulthandler
import resource
import sys
import warnings
from pathlib import Path

import torch

from pathokd.embed import embed_slides, read_embeddings, read_good, read_header, verify_embeddings
from pathokd.errors import PathokdError
from pathokd.models import StudentSpec, build_student
from pathokd.slides import TileSpec, find_slides, tile_slides

MEMORY = 12 * 2**30
"""Address space: a damaged size must not take the machine's memory."""
EXPECTED = (PathokdError, ValueError)


def slide(path: Path) -> str:
    """Tile and embed; a slide that cannot be used is a failed row, so nothing at all may be raised."""
    out = path.parent / "out" / path.stem
    summary = tile_slides(find_slides(path), TileSpec(mpp=1.0, tile_px=64, min_tissue=0.0), out / "tiles", workers=1)
    if summary["status"][0] == "failed" or not summary["n_tiles"][0]:
        return f"tile: {summary['message'][0]}"
    done = embed_slides(ENCODER, out / "tiles", out, batch_size=8, workers=2)
    found = verify_embeddings(out)
    assert found["status"][0] == done["status"][0], found
    return f"embed: {done['status'][0]} {done['n_unreadable'][0]} {done['message'][0]}"


def features(path: Path) -> str:
    """Readers raise StoreError or return; `verify` has a row for every file."""
    said = []
    for read in (read_header, read_good, read_embeddings):
        try:
            read(path)
            said.append("read")
        except EXPECTED as error:
            said.append(type(error).__name__)
    single = path.parent / "single" / path.stem
    single.mkdir(parents=True)
    (single / path.name).symlink_to(path)
    said.append(str(verify_embeddings(single)["status"][0]))
    return " ".join(said)


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    if sys.argv[1] == "slides":
        ENCODER = build_student(
            StudentSpec("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}, image_px=64, mpp=1.0)
        ).eval()
    run = {"slides": slide, "features": features}[sys.argv[1]]
    names = Path(sys.argv[2], "todo.txt").read_text().split()
    for name in names:
        print(f"{name}\t", end="", flush=True)
        try:
            print(run(Path(sys.argv[2], name)).replace("\n", " "), flush=True)
        except BaseException as error:
            print(f"RAISED {type(error).__name__}: {error}".replace("\n", " "), flush=True)
            if "--raise" in sys.argv:
                raise
