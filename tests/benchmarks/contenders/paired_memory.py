"""Memory of this process, for the contenders of `test_paired.py`.

On Linux `ru_maxrss` starts at what the process that started this one held, and that one has loaded torch; VmHWM
starts at nothing.
"""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident_bytes() -> int:
    """What is resident now; where the system does not say, the peak so far."""
    return _status("VmRSS") if STATUS.is_file() else peak_bytes()


def peak_bytes() -> int:
    """The most that was ever resident."""
    if STATUS.is_file():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
