"""`pathokd cache`: what it will take, then the teacher's targets of every tile."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pathokd.cli.teacher import teacher_on

if TYPE_CHECKING:
    from pathokd.data.batch import TileSource
    from pathokd.data.targets import TargetSpec
    from pathokd.models import Teacher


def cache(
    teacher: str,
    tiles: str,
    *,
    out: str,
    tokens: Literal["cls", "cls+mean", "pooled", "patches"] = "cls",
    pca: int | None = None,
    dtype: Literal["fp32", "fp16", "int8"] = "fp16",
    view_px: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    card: str | None = None,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    image_px: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
) -> int:
    """Run a teacher once and store its targets.

    Args:
        teacher: An exported folder, a card's name, hf-hub:OWNER/NAME or a .safetensors file.
        tiles: Packed folder, or the folder of `pathokd tile`.
        out: Folder for the targets, which model.teachers.NAME.targets of a recipe names.
        tokens: What is stored; pooled is a grid of 4 x 4 means, and every kind has the class token.
        pca: Principal directions kept of the patch tokens.
        dtype: Of the stored numbers.
        view_px: Side of the view, data.geometry.size_px of the recipe; by default the teacher's input.
        precision: Of the teacher.
        card: Card that describes the weights of a folder or file.
        architecture: timm name that describes the weights of a bare file.
        model_args: Arguments of the timm model, such as {depth: 6} for the first six blocks of the file.
        image_px: Another input side than the card's.
        batch_size: Tiles per forward pass.
        workers: Threads that read tiles.
        device: auto or a torch device.
        dry_run: Say size, hours and break-even, and stop.
        overwrite: Compute anew, whatever the folder holds.
    """
    from pathokd.data.targets import TargetSpec
    from pathokd.data.wsi import open_tiles
    from pathokd.embed.targets import write_targets
    from pathokd.models import TeacherSpec

    if min(batch_size, workers) < 1:
        raise ValueError(f"workers and batch_size should be at least 1, got {workers} and {batch_size}.")
    spec, source = TargetSpec(tokens, pca, dtype, view_px), open_tiles(tiles)
    named = TeacherSpec(
        teacher, precision, card=card, architecture=architecture, model_args=model_args, image_px=image_px
    )
    loaded = teacher_on(device, named)
    if dry_run or overwrite or not (Path(out) / "header.json").is_file():
        print(_forecast(loaded, source, spec, batch_size), file=sys.stderr, flush=True)
    if dry_run:
        return 0
    store = write_targets(loaded, source, out, spec, batch_size=batch_size, workers=workers, overwrite=overwrite)
    shares = store.header["facts"]["lost"]
    lost = " and ".join(f"{share:.1e} of the spread of {kind} tokens" for kind, share in shares.items())
    print(
        f"Targets of {len(store)} tiles in {out}; storing them lost {lost}. "
        f"Train from them with --model.teachers.NAME.targets {out}"
    )
    return 0


def _forecast(teacher: "Teacher", source: "TileSource", spec: "TargetSpec", batch_size: int) -> str:
    """Size, hours and break-even epochs."""
    import torch

    from pathokd.cost.caching import Workload, break_even_epochs
    from pathokd.cost.profile import count_gflops, measure_tiles_per_s, seen_px
    from pathokd.embed.target_job import target_bytes
    from pathokd.embed.targets import samples

    n, size = len(source), target_bytes(teacher, source, spec)
    device, side = teacher.device, spec.view_px or teacher.card.image_px
    # Few tiles on a CPU, where a batch of a ViT-g takes a minute; whole batches where only they fill the device.
    images = torch.zeros(min(batch_size, 4) if device.type == "cpu" else batch_size, 3, side, side, dtype=torch.uint8)
    rate = measure_tiles_per_s(teacher, images.to(device), seconds=1.0, warmup=1)
    gflops, sampled = count_gflops(teacher.card, image_px=seen_px(teacher.card, side)), samples(spec, n)
    work = Workload(n, 1, gflops, 0, target_bytes=size // n, sampled=sampled, gflop_per_s=rate * gflops)
    what = f"{spec.tokens}, {spec.dtype}{f', {spec.pca} principal directions' if spec.pca else ''}"
    return (
        f"Targets of {n} tiles ({what}) take {_gigabytes(size)} and {_hours((n + sampled) / rate)} at the {rate:.3g} "
        f"tiles/s that {teacher.card.name} just did on {device.type}. "
        f"The teacher costs {gflops:.3g} GFLOP a tile, in every epoch if it runs with the training and once this way: "
        f"stored targets pay after {break_even_epochs(work):.1f} epochs."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 360 else f"{seconds / 60:.1f} minutes"
