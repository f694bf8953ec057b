"""`pathokd denoise`: what stain and scanner do to a teacher's tokens, to be kept out of its targets."""

from typing import Any, Literal

from pathokd.cli.teacher import teacher_on
from pathokd.files import check_file


def denoise(
    teacher: str,
    tiles: str,
    *,
    out: str,
    rank: int = 4,
    case: str = "case",
    conditions: list[str] = ["stain", "scanner"],  # noqa: B006 (never changed; jsonargparse wants a list)
    max_places: int = 2048,
    card: str | None = None,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 32,
    workers: int = 1,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Find the directions in which a teacher's tokens of one place differ between conditions.

    Args:
        teacher: A card's name, hf-hub:OWNER/NAME, an exported folder, or a .safetensors file.
        tiles: Packed or tile folder of registered slides; of slides scanned once, what `pathokd simulate` makes of it.
        out: The file, which model.teachers.NAME.denoise of a recipe names.
        rank: Directions taken out, 1 to 8.
        case: Column whose equal values are registered with each other.
        conditions: Columns that together name the condition.
        max_places: Places looked at, drawn by the seed.
        card: Name of the card that describes a bare file.
        architecture: timm name that describes it, in place of a card.
        model_args: Arguments of the timm model, such as {depth: 6} for the first six blocks of the file.
        precision: Of the teacher.
        batch_size: Tiles per forward pass.
        workers: Processes that read tiles.
        device: auto, cpu, cuda or mps.
        seed: Of the draw.
        overwrite: Make the file anew.
    """
    from pathokd.data.places import RegisteredSpec
    from pathokd.data.wsi import open_tiles
    from pathokd.distill.denoise_fit import DenoiseSpec, fit_denoiser
    from pathokd.models.teacher import TeacherSpec

    check_file(out, "denoise.safetensors")
    spec = DenoiseSpec(rank, RegisteredSpec(case, tuple(conditions)), max_places, seed)
    source = open_tiles(tiles)
    named = TeacherSpec(teacher, precision, card=card, architecture=architecture, model_args=model_args)
    results = fit_denoiser(
        teacher_on(device, named), source, out, spec, batch_size=batch_size, workers=workers, overwrite=overwrite
    )
    for kind, result in results.items():
        shares = ", ".join(f"{share:.1%}" for share in result["share"])
        print(
            f"{kind}: {len(result['share'])} directions hold {sum(result['share']):.1%} of what differs between "
            f"conditions ({shares}) and {result['lost']:.1%} of all variance, of {result['tokens']} tokens."
        )
    print(f"Train without them by --model.teachers.NAME.denoise {out}")
    return 0
