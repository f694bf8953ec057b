"""AdamW with layer decay and scheduled learning rate and weight decay."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pathokd.distill.schedules import cosine, warmup_cosine
from pathokd.types import FloatArray

TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token")
"""Embeddings beside the patches', as timm names them; `dist_token` is distilled DeiT's."""


@dataclass(frozen=True)
class OptimSpec:
    """Optimiser settings.

    Args:
        lr: peak learning rate for the batch size in use; nothing rescales it behind your back (method.md gives 5e-4 at
            batch 1024, and the square root of the ratio for other batches).
        final_lr: learning rate the cosine tends to.
        warmup: share of all steps, in [0, 1).
        weight_decay: at the first and at the last step; biases, norms, LayerScale, position and class tokens get none.
        betas: of AdamW.
        layer_decay: factor on the learning rate per block below the top, in (0, 1].
        patch_embed_lr: further factor on the patch embedding.
    """

    lr: float = 5e-4
    final_lr: float = 1e-6
    warmup: float = 0.05
    weight_decay: tuple[float, float] = (0.04, 0.2)
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    patch_embed_lr: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of all steps and must lie in [0, 1), got {self.warmup}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}.")
        if min(self.final_lr, self.patch_embed_lr, *self.weight_decay) < 0:
            raise ValueError(
                f"final_lr, patch_embed_lr and weight_decay must not be negative, got {self.final_lr}, "
                f"{self.patch_embed_lr} and {self.weight_decay}."
            )


def layer_of(name: str, depth: int) -> int:
    """Height of a ViT parameter: 0 for embeddings and tokens, i + 1 for block i, depth + 1 for what lies above."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block.group(1)) + 1
    return 0 if name.startswith(("patch_embed.", "norm_pre", *TOKENS)) else depth + 1


def takes_weight_decay(name: str, parameter: nn.Parameter, spared: Collection[str] = ()) -> bool:
    """Whether weight decay applies: to matrices only, not to biases, norms, LayerScale, tokens and positions.

    Args:
        name: of the parameter.
        parameter: itself.
        spared: names that the architecture takes out besides, such as BEiT's tables of relative positions.
    """
    return parameter.ndim > 1 and not name.endswith(TOKENS) and name not in spared


def parameter_groups(backbone: nn.Module, heads: Iterable[nn.Module], spec: OptimSpec) -> list[dict[str, Any]]:
    """AdamW groups with `lr_scale` and `wd_scale`, one for each pair of values that occurs.

    Args:
        backbone: a timm ViT.
        heads: modules on top; they take the full learning rate.
        spec: settings.
    """
    depth = len(backbone.blocks)  # type: ignore[arg-type]
    spared: Collection[str] = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # type: ignore[operator]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        lr_scale = spec.layer_decay ** (depth + 1 - layer_of(name, depth))
        if name.startswith("patch_embed."):
            lr_scale *= spec.patch_embed_lr
        key = lr_scale, float(takes_weight_decay(name, parameter, spared))
        groups.setdefault(key, []).append(parameter)
    for head in heads:
        for name, parameter in head.named_parameters():
            groups.setdefault((1.0, float(takes_weight_decay(name, parameter))), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": lr_scale, "wd_scale": wd_scale}
        for (lr_scale, wd_scale), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


@dataclass(frozen=True)
class Schedules:
    """What each optimiser step uses; arrays of shape (steps,)."""

    lr: FloatArray
    weight_decay: FloatArray
    momentum: FloatArray

    @classmethod
    def plan(cls, spec: OptimSpec, steps: int, momentum: tuple[float, float]) -> "Schedules":
        """Schedules over `steps` optimiser steps; `momentum` is that of the EMA, first and last."""
        warmup_steps = min(round(spec.warmup * steps), steps - 1)
        return cls(
            lr=warmup_cosine(steps, peak=spec.lr, final=spec.final_lr, warmup_steps=warmup_steps),
            weight_decay=cosine(steps, start=spec.weight_decay[0], final=spec.weight_decay[1]),
            momentum=cosine(steps, start=momentum[0], final=momentum[1]),
        )

    def at(self, name: str, step: int) -> float:
        """Value of the schedule `name` at `step`; past the end, the last one."""
        values: FloatArray = getattr(self, name)
        return float(values[min(step, len(values) - 1)])

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set every group's learning rate and weight decay for `step`."""
        lr, weight_decay = self.at("lr", step), self.at("weight_decay", step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay * group["wd_scale"]
