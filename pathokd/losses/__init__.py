"""Objectives as functions of tensors, each with a small module that holds its numbers."""

from pathokd.losses.alignment import MSE, AlignmentLoss, Cosine, CosineSmoothL1, SmoothL1

__all__ = ["MSE", "AlignmentLoss", "Cosine", "CosineSmoothL1", "SmoothL1"]
