"""Objectives as functions of tensors, each with a small module that holds its numbers."""

from pathokd.losses.alignment import MSE, AlignmentLoss, Cosine, CosineSmoothL1, SmoothL1
from pathokd.losses.prototypes import DINO, IBOT, PrototypeLoss
from pathokd.losses.spread import KoLeo, SpreadLoss

__all__ = [
    "DINO",
    "IBOT",
    "MSE",
    "AlignmentLoss",
    "Cosine",
    "CosineSmoothL1",
    "KoLeo",
    "PrototypeLoss",
    "SmoothL1",
    "SpreadLoss",
]
