"""`pathokd.data.pack.pack_tiles` on two threads, whole: manifest in, shards and index on the disk.

Usage: python read_pack.py JOB.json, written by `test_reading.py`.
"""

import json
import sys
import time
from pathlib import Path

from pathokd.data.pack import pack_tiles


def main(job: dict) -> None:
    start = time.perf_counter()
    result = pack_tiles(job["manifest"], job["packed"], workers=2, overwrite=True)
    seconds = time.perf_counter() - start
    Path(job["out"]).write_text(json.dumps({"tiles": result.tiles, "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
