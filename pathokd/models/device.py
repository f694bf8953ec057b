"""Where models run."""

import torch


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
