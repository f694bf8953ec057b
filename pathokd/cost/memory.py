"""What a training holds in memory, from the sizes of its models: a plan to look at before the first step.

With n tokens of width d, a block of a vision transformer keeps for its backward pass, per token, in numbers:

    in fp32      2 d          what enters the two norms (the residual stream), and 4 for their means and deviations
                 heads        log-sum-exp of the fused attention
    as computed  d            norm 1, which queries, keys and values are made from
                 3 d          queries, keys, values
                 d            what attention gives
                 d            norm 2
                 2 m or 4 m   MLP: before and after GELU; gated: both halves, the activated one, and their product
                 2 d          what the two LayerScales multiply, if there are any
                 2 d          queries and keys once more, if positions turn them (rotary: DINOv3, EVA-02)
    in fp32      2 d          queries and keys once more, if attention adds a bias of positions (BEiT); under autocast
                              queries, keys and values in fp32 instead, and n shares a head: attention is not fused
                              then (measured on a CPU)

where m is the width that the MLP's last layer takes, and "as computed" is 2 bytes a number under bf16 or fp16 autocast.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from pathokd.models.build import build_timm
from pathokd.models.cards import ModelCard

FP32 = 4
"""Bytes a number."""
ADAM_STATES = 2
"""Numbers that AdamW keeps per parameter."""
RUNTIME_BYTES = 600 * 2**20
"""Python, torch and its kernels: some 500 MiB on a CPU, and about as much for a CUDA context."""


class UnplannedError(ValueError):
    """A model whose blocks the arithmetic here does not describe; it can be trained all the same."""


class VitShape(NamedTuple):
    """What the arithmetic of a vision transformer's memory needs."""

    tokens: int
    dim: int
    depth: int
    heads: int
    mlp_before: int
    """Width that the MLP's first layer gives, both halves of a gated one."""
    mlp_after: int
    """Width that its last layer takes."""
    layer_scale: bool
    params: int
    image_numbers: int
    """Of one picture."""
    rotary: bool = False
    """Whether queries and keys are turned by their positions."""
    biased: bool = False
    """Whether attention adds a bias of relative positions."""


def vit_shape(card: ModelCard, image_px: int | None = None) -> VitShape:
    """Sizes of the model that a card describes, built without weights.

    Args:
        card: its facts.
        image_px: another input side than the card's.

    Raises:
        UnplannedError: blocks of another kind.
    """
    side = image_px or card.image_px
    model = build_timm(card.architecture, card.model_args, image_px=side, device="meta")
    block, depth = model.blocks[0], len(model.blocks)
    if hasattr(block, "attns"):  # timm's 18x2: several of each side by side, counted as if one came after the other
        depth *= len(block.attns)
        heads, mlp, scaled = block.attns[0].attn.num_heads, block.ffns[0].mlp, _is_layer_scale(block.attns[0].ls)
    elif hasattr(block, "attn") and hasattr(block, "mlp"):
        heads, mlp, scaled = block.attn.num_heads, block.mlp, _has_layer_scale(block)
    else:
        raise UnplannedError(f"{card.architecture} is made of {type(block).__name__}, whose memory nobody measured")
    gate = getattr(mlp, "fc1_g", None)
    before = 2 * gate.out_features if gate is not None else mlp.fc1.out_features
    return VitShape(
        tokens=(side // card.patch_px) ** 2 + card.num_prefix_tokens,
        dim=card.embed_dim,
        depth=depth,
        heads=heads,
        mlp_before=before,
        mlp_after=mlp.fc2.in_features,
        layer_scale=scaled,
        params=sum(parameter.numel() for parameter in model.parameters()),
        image_numbers=3 * side * side,
        rotary=getattr(model, "rope", None) is not None,
        biased=_has_bias(model),
    )


def _has_layer_scale(block: torch.nn.Module) -> bool:
    """timm's ViT keeps LayerScales as modules, its EVA, DINOv3 and BEiT as parameters that may be None."""
    if hasattr(block, "ls1"):
        return _is_layer_scale(block.ls1)
    return getattr(block, "gamma_1", None) is not None


def _has_bias(model: torch.nn.Module) -> bool:
    """BEiT keeps a table of relative positions in each block or one for all, timm's relpos models a module."""
    attention = getattr(model.blocks[0], "attn", None)  # type: ignore[index]
    kept = [(attention, "relative_position_bias_table"), (attention, "rel_pos")]
    kept += [(model, "rel_pos_bias"), (model, "shared_rel_pos")]
    return any(getattr(owner, name, None) is not None for owner, name in kept)


def _is_layer_scale(module: object) -> bool:
    return not isinstance(module, torch.nn.Identity)


def activation_bytes(shape: VitShape, itemsize: int = FP32) -> int:
    """What one picture's forward pass keeps for the backward pass; see the head of this file.

    Args:
        shape: of the model.
        itemsize: bytes a number of what is computed: 2 under autocast, 4 without.
    """
    d, gated = shape.dim, shape.mlp_before > shape.mlp_after
    mlp = shape.mlp_before + shape.mlp_after * (2 if gated else 1)
    computed = 6 * d + mlp + 2 * d * (shape.layer_scale + shape.rotary)
    block = FP32 * (2 * d + 4 + shape.heads) + itemsize * computed
    if shape.biased:
        # Under autocast queries, keys and values are kept in fp32 in place of what was computed.
        half = FP32 * (3 * d + shape.heads * shape.tokens) - itemsize * 3 * d
        block += half if itemsize < FP32 else FP32 * 2 * d
    norm = FP32 * (2 * d + 2)  # the last one, and what it gives
    return shape.tokens * (shape.depth * block + norm) + itemsize * shape.image_numbers


def forward_bytes(shape: VitShape, itemsize: int = FP32) -> int:
    """The most that one picture's forward pass holds at once without gradients: in the MLP of a block.

    Args:
        shape: of the model.
        itemsize: bytes a number.
    """
    gated = shape.mlp_before > shape.mlp_after
    mlp = shape.mlp_before + shape.mlp_after * (2 if gated else 1)
    return itemsize * shape.tokens * (2 * shape.dim + max(mlp, 4 * shape.dim))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step, by what they are for.

    Args:
        teachers: weights of running teachers.
        student: trained parameters, heads included.
        average: the moving average, or 0.
        optimiser: AdamW's two moments.
        gradients: of the trained parameters, with DDP's copy of them.
        activations: kept for the backward pass, heads included.
        targets: what teachers said of the batch, their prototypes, and the pictures.
        working: the largest temporary: a teacher's forward pass, a block's backward pass, AdamW's update.
        runtime: the programme itself.
    """

    teachers: int = 0
    student: int = 0
    average: int = 0
    optimiser: int = 0
    gradients: int = 0
    activations: int = 0
    targets: int = 0
    working: int = 0
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """The peak: gradients grow while activations are let go, so the larger of the two counts."""
        held = self.teachers + self.student + self.average + self.optimiser + self.targets + self.runtime
        return held + max(self.activations, self.gradients) + self.working

    def sentence(self, available: int | None, where: str) -> str:
        """The plan in words, and whether it fits.

        Args:
            available: bytes that the training may take; None if nobody knows.
            where: name of the device.
        """
        names = [each.name for each in fields(self)]
        parts = ", ".join(f"{name} {gib(getattr(self, name))}" for name in names if gib(getattr(self, name)) != gib(0))
        said = f"Memory plan: {gib(self.total)} GiB at the peak ({parts})"
        if available is None:
            return f"{said}."
        if self.total <= available:
            return f"{said}; {where} has {gib(available)}."
        return (
            f"{said}, and {where} has {gib(available)}: this will probably not fit; lower data.batch_size and raise "
            "trainer.accumulate_grad_batches, or set the teacher's micro_batch."
        )


def gib(size: float) -> str:
    """Bytes in GiB, two decimals, or one of what is large."""
    return f"{size / 2**30:.2f}" if size < 10 * 2**30 else f"{size / 2**30:.1f}"


def available_bytes(device: torch.device, processes: int = 1) -> int | None:
    """What a training may take on a device, with what this process already holds there.

    Args:
        device: where it trains.
        processes: that share the memory, on a CPU.

    Returns:
        Bytes; None where the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    total = min((size for size in (_physical_bytes(), _group_bytes()) if size is not None), default=None)
    return None if total is None else total // processes


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _group_bytes() -> int | None:
    """The limit of the container, if there is one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int((Path("/sys/fs/cgroup") / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
