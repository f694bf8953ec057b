"""`pathokd prototypes`: the fixed head of a public teacher, for DINO and iBOT distillation."""

from typing import Any, Literal

from pathokd.cli.teacher import teacher_on


def prototypes(
    teacher: str,
    tiles: str,
    *,
    out: str,
    k: int = 4096,
    k_patches: int | None = None,
    views: int = 1,
    patches_per_tile: int = 16,
    max_tiles: int | None = None,
    scale: tuple[float, float] = (0.32, 1.0),
    iterations: int = 25,
    temperatures: list[float] = [0.04, 0.05, 0.06, 0.07],  # noqa: B006 (never changed; jsonargparse wants a list)
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
    """Cluster a teacher's tokens.

    Args:
        teacher: A card's name, hf-hub:OWNER/NAME, an exported folder, or a .safetensors file.
        tiles: Packed folder or tile folder.
        out: Folder for prototypes.safetensors; a run that was cut off goes on.
        k: Prototypes of the class token; 4 thousand to 131 thousand for a real cohort.
        k_patches: Prototypes of patch tokens; by default as many.
        views: Random crops of each tile.
        patches_per_tile: Patch tokens taken from each crop.
        max_tiles: Tiles used, drawn by the seed; by default all.
        scale: Share of a tile that a crop shows, from and to.
        iterations: Most steps of k-means.
        temperatures: Teacher temperatures at which balanced centres are stored; losses use any between them.
        card: Name of the card that describes a bare file.
        architecture: timm name that describes it, in place of a card.
        model_args: Arguments of the timm model, such as {depth: 6} for the first six blocks of the file.
        precision: Of the teacher.
        batch_size: Tiles per forward pass.
        workers: Processes that read tiles.
        device: auto, cpu, cuda or mps.
        seed: Of tiles, crops, tokens and first centroids.
        overwrite: Start over although the folder holds prototypes.
    """
    from pathokd.data.wsi import open_tiles
    from pathokd.distill.prototype_fit import PrototypeSpec, fit_prototypes
    from pathokd.distill.prototype_tokens import TokenSpec
    from pathokd.models.teacher import TeacherSpec

    spec = PrototypeSpec(
        k, k_patches, TokenSpec(views, patches_per_tile, scale, max_tiles, seed), iterations, tuple(temperatures)
    )
    source = open_tiles(tiles)
    named = TeacherSpec(teacher, precision, card=card, architecture=architecture, model_args=model_args)
    results = fit_prototypes(
        teacher_on(device, named), source, out, spec, batch_size=batch_size, workers=workers, overwrite=overwrite
    )
    for kind, result in results.items():
        print(
            f"{kind}: {result.k} prototypes of {result.tokens} tokens, mean cosine {result.similarity:.3f} after "
            f"{result.iterations} steps; the most common has {result.largest:.1%}, {result.unused} have none."
        )
    print(f"In {out}/prototypes.safetensors; name the folder as `head` in pathokd.losses.DINO and IBOT.")
    return 0
