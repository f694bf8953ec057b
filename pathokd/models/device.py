"""Where models run."""

import torch
from torch import Tensor


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such device, or torch has none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(wanted) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(wanted)
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = found.get(device.type, 1)
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {name} was asked for and torch sees {count} {device.type} device(s) here: take auto or cpu."
        )
    return device


def double(x: Tensor) -> Tensor:
    """In fp64, on its device; on the CPU if that is Apple's MPS, which has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
