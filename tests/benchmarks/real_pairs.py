"""Paired manifests of the real sets that `pathokd robustness` is shown on.

    PATHOKD_REAL_DATA=../shared/data python tests/benchmarks/real_pairs.py runs/pairs
    pathokd robustness tile_data/teacher runs/quickstart/student --pairs runs/pairs/os2.csv --out runs/os2

`os2.csv`: one 500 um field of OS-2 (Ki67) on a Hamamatsu and an Olympus, registered, cut into overlapping places of
90 um. `camelyon17.csv`: 25 tiles of five centres, each cut in four, neither registered nor labelled.
"""

import argparse
import itertools
import os
from pathlib import Path

import pandas as pd

from pathokd.slides.slide import Slide

MPP, TILE_PX, PLACES = 0.4, 224, 9
"""Olympus has 0.346 um/px, so 0.4 is about the finest that both have; nine by nine places overlap by half."""


def os2(data: Path) -> pd.DataFrame:
    rows = []
    for scanner, file in (("Hamamatsu", "OS-2-ndpi.ome.tif"), ("Olympus", "OS-2-vsi.ome.tif")):
        path = data / "wsi_small" / file
        with Slide(path) as slide:
            width_um = min(slide.dimensions) * slide.mpp
            step = (width_um - TILE_PX * MPP) / (PLACES - 1) / slide.mpp
        for row, column in itertools.product(range(PLACES), repeat=2):
            where = {"x": int(column * step), "y": int(row * step), "mpp": MPP, "tile_px": TILE_PX}
            rows.append({"pair_id": f"{row}-{column}", "scanner": scanner, "path": str(path.resolve()), **where})
    return pd.DataFrame(rows)


def camelyon17(data: Path) -> pd.DataFrame:
    rows = []
    for path in sorted((data / "multi_scanner/camelyon17_5centres").glob("*.png")):
        site = path.name.split("_")[0]
        for y, x in itertools.product((0, 256), repeat=2):
            # Tiles come without a resolution; 0.5 is that of the copies CAMELYON17 tiles are usually cut from.
            where = {"x": x + 16, "y": y + 16, "mpp": 0.5, "mpp_level0": 0.5, "tile_px": TILE_PX}
            rows.append({"slide_id": path.stem, "case": path.stem, "site": site, "path": str(path.resolve()), **where})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out, data = parser.parse_args().out, Path(os.environ["PATHOKD_REAL_DATA"])
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("os2", os2(data)), ("camelyon17", camelyon17(data))):
        table.to_csv(out / f"{name}.csv", index=False)
        print(f"{len(table)} tiles in {out}/{name}.csv")


if __name__ == "__main__":
    main()
