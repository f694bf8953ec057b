"""Objectives as functions of tensors, each with a small module that holds its numbers."""

from pathokd.losses.alignment import MSE, AlignmentLoss, Cosine, CosineSmoothL1, SmoothL1
from pathokd.losses.invariance import Consistency, InvarianceLoss
from pathokd.losses.prototypes import DINO, IBOT, PrototypeLoss
from pathokd.losses.registered import PlaceLoss, RegisteredInfoNCE
from pathokd.losses.relational import RKD, RelationLoss
from pathokd.losses.spread import KoLeo, SpreadLoss

__all__ = [
    "DINO",
    "IBOT",
    "MSE",
    "RKD",
    "AlignmentLoss",
    "Consistency",
    "Cosine",
    "CosineSmoothL1",
    "InvarianceLoss",
    "KoLeo",
    "PlaceLoss",
    "PrototypeLoss",
    "RegisteredInfoNCE",
    "RelationLoss",
    "SmoothL1",
    "SpreadLoss",
]
