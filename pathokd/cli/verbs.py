"""The verbs: each turns words into one call and says what came of it. Heavy imports wait until they are needed."""

import json
from pathlib import Path
from typing import Any, Literal

from pathokd.cli.teacher import device_for
from pathokd.errors import StoreError
from pathokd.types import Mpp


def inspect(slides: list[str], *, mpp_level0: Mpp | None = None, json_lines: bool = False) -> int:
    """Say what slides are.

    Args:
        slides: Folders, globs, files or CSV lists.
        mpp_level0: Microns per level-0 pixel for slides that do not say.
        json_lines: Print one JSON object per slide.
    """
    from pathokd.slides.inspect import inspect_slide
    from pathokd.slides.sources import find_slides

    found = find_slides(slides, mpp=mpp_level0)
    facts = [inspect_slide(source.path, mpp=source.mpp, mpp_else=source.mpp_else) for source in found]
    for slide in facts:
        print(json.dumps(slide, ensure_ascii=False) if json_lines else _described(slide))
    return 0 if all(slide["usable"] for slide in facts) else 1


def _described(slide: dict[str, Any]) -> str:
    lines = [slide["path"]]
    if "vendor" in slide:
        width, height = slide["dimensions"]
        lines.append(
            f"  {slide['vendor']}, {width} x {height} px, objective {slide['objective_power'] or 'not stated'}"
        )
        if slide["mpp"]:
            lines.append(f"  {slide['mpp']:.4g} um/px at level 0 (source: {slide['mpp_source']})")
        for number, level in enumerate(slide["levels"]):
            resolution = f", {level['mpp']:.4g} um/px" if level["mpp"] else ""
            size = f"{level['width']} x {level['height']}"
            lines.append(f"  level {number}: {size}, downsample {level['downsample']:.6g}{resolution}")
        icc = slide["icc_profile_bytes"]
        lines.append(f"  ICC profile: {f'{icc} bytes' if icc else 'none'}")
        lines.append(f"  associated images: {', '.join(slide['associated_images']) or 'none'}")
        lines += [f"  warning: {warning}" for warning in slide["warnings"]]
    lines.append("  can be tiled" if slide["usable"] else f"  cannot be tiled: {slide['error']}")
    return "\n".join(lines)


def tile(
    slides: list[str],
    *,
    out: str,
    mpp: Mpp = 0.5,
    tile_px: int = 224,
    stride: int | None = None,
    min_tissue: float = 0.25,
    mpp_level0: Mpp | None = None,
    icc: bool = False,
    allow_upsampling: bool = False,
    border: Literal["inside", "cover"] = "inside",
    workers: int = 2,
    overwrite: bool = False,
    skip_errors: bool = False,
) -> int:
    """Find tissue and write the table of tiles.

    Args:
        slides: Folders, globs, files or CSV lists (columns slide_id, path, mpp, and any other).
        out: Folder for manifest.parquet, summary.csv, overlays and GeoJSON.
        mpp: Microns per pixel of a tile.
        tile_px: Side of a tile in pixels.
        stride: Step between tiles in tile pixels; by default the side.
        min_tissue: Least share of a tile that is tissue.
        mpp_level0: Microns per level-0 pixel for slides that do not say.
        icc: Convert colours to sRGB by the slide's profile.
        allow_upsampling: Accept slides coarser than mpp.
        border: Keep tiles inside the slide, or cover it (white outside).
        workers: Slides at a time.
        overwrite: Redo slides that are done.
        skip_errors: Exit with 0 although a slide failed.
    """
    from pathokd.data.packed import INDEX_NAME
    from pathokd.slides.manifest import TileSpec
    from pathokd.slides.sources import find_slides
    from pathokd.slides.tile import tile_slides

    if (Path(out) / INDEX_NAME).is_file():  # which is what every other verb would go on to read there
        raise StoreError(f"{out} holds packed tiles: choose another output folder.")
    spec = TileSpec(mpp, tile_px, stride, min_tissue, icc, allow_upsampling, border)
    summary = tile_slides(find_slides(slides, mpp=mpp_level0), spec, out, workers=workers, overwrite=overwrite)
    failed = int((summary["status"] == "failed").sum())
    print(f"{summary['n_tiles'].sum()} tiles of {len(summary) - failed} slides in {out}/manifest.parquet")
    empty = int(((summary["status"] != "failed") & (summary["n_tiles"] == 0)).sum())
    if empty:
        print(f"{empty} of {len(summary)} slides gave no tile: {out}/summary.csv says why.")
    code = slides_outcome(failed, len(summary), f"{out}/summary.csv", skip_errors)
    return 1 if empty and not summary["n_tiles"].sum() else code  # which leaves the next verb nothing to do


def slides_outcome(failed: int, total: int, where: str, skip_errors: bool) -> int:
    """Say how many slides failed, and the exit code that follows."""
    if failed:
        print(f"{failed} of {total} slides failed: {where} says why.")
    return 1 if failed and not skip_errors else 0


def pack(
    tiles: list[str],
    *,
    out: str,
    quality: int = 90,
    shard_tiles: int = 4096,
    workers: int | None = None,
    overwrite: bool = False,
    skip_errors: bool = False,
) -> int:
    """Store tiles in shards.

    Args:
        tiles: Folders of `pathokd tile`, or manifests; several become one set, say of several magnifications.
        out: Folder for shards and index.
        quality: JPEG quality; 0 stores PNG.
        shard_tiles: Tiles per shard.
        workers: Reading threads; by default one per core.
        overwrite: Pack anew.
        skip_errors: Exit with 0 although a tile could not be read.
    """
    from pathokd.data.pack import PackSpec, pack_tiles

    result = pack_tiles(tiles, out, PackSpec(quality, shard_tiles), workers=workers, overwrite=overwrite)
    print(f"{result.tiles} tiles in {out}")
    return _unreadable(len(result.unreadable), out, skip_errors)


def _unreadable(lost: int, out: str, skip_errors: bool) -> int:
    if lost:
        print(f"{lost} tiles could not be read and are left out: {out}/unreadable.csv says why.")
    return 1 if lost and not skip_errors else 0


def simulate(
    sources: list[str],
    *,
    out: str,
    stain: list[str] = [],  # noqa: B006 (never changed; jsonargparse wants a list)
    scanner: list[str] = [],  # noqa: B006
    severity: float = 1.0,
    mpp_level0: Mpp | None = None,
    quality: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    skip_errors: bool = False,
) -> int:
    """Show tiles or slides under other conditions, and all presets on a contact sheet.

    Args:
        sources: A packed folder, a folder of `pathokd tile`, or slides (folders, globs, files, CSV lists).
        out: Gets contact_sheet.png; for tiles a packed folder of the original and every condition, registered with each
            other; for slides a pyramidal TIFF of each, and slides.csv.
        stain: Names of stainings, as cmu-1,h-long-e-short; every one is combined with every scanner.
        scanner: Names of scanner profiles, as soft-warm,pale.
        severity: How far to go, 0 (nothing) to 1.
        mpp_level0: Microns per level-0 pixel for slides that do not say.
        quality: JPEG quality of what is written; by default 95 for tiles, 90 for slides.
        seed: Of noise.
        overwrite: Delete what earlier runs made in OUT, and start over.
        skip_errors: Exit with 0 although something could not be read.
    """
    from pathokd.data.conditions import conditions
    from pathokd.data.pack import PackSpec
    from pathokd.data.sample import typical_tile
    from pathokd.data.simulate import simulate_tiles
    from pathokd.data.simulate_slides import simulate_slides
    from pathokd.data.wsi import holds_tiles, open_tiles
    from pathokd.report.contact_sheet import write_contact_sheet
    from pathokd.slides.sources import find_slides

    wanted = conditions(stain, scanner, severity) if stain or scanner else []
    tiled = len(sources) == 1 and holds_tiles(sources[0])
    source = open_tiles(sources[0]) if tiled else find_slides(sources, mpp=mpp_level0)
    if not wanted:
        code = 0
    elif isinstance(source, list):
        quality = 90 if quality is None else quality
        outcomes = simulate_slides(source, out, wanted, seed=seed, quality=quality, overwrite=overwrite)
        failed = int((outcomes["status"] == "failed").sum())
        print(f"{len(outcomes) - failed} slides in {out}/slides.csv")
        for row in outcomes[outcomes["status"] == "failed"].itertuples():
            print(f"{row.slide_id}: {row.message}")
        code = 1 if failed and not skip_errors else 0
    else:
        spec = PackSpec(95 if quality is None else quality)
        packed = simulate_tiles(source, out, wanted, spec, seed=seed, overwrite=overwrite)
        print(f"{packed.tiles} tiles under {1 + len(wanted)} conditions, the original among them, in {out}")
        code = _unreadable(len(packed.unreadable), out, skip_errors)
    # Last, so that a run that was refused leaves the sheet of the one before.
    write_contact_sheet(f"{out}/contact_sheet.png", typical_tile(source))
    print(f"All presets on one tile: {out}/contact_sheet.png")
    return code


def stain_stats(tiles: str, *, out: str, tiles_per_slide: int = 50) -> int:
    """Measure how a cohort is stained.

    Args:
        tiles: A packed folder, or a folder of `pathokd tile`.
        out: YAML file.
        tiles_per_slide: Tiles looked at per slide, spread over it.
    """
    from pathokd.data.simulate import measure_cohort
    from pathokd.data.wsi import open_tiles
    from pathokd.files import check_file

    check_file(out, "stains.yaml")
    found = measure_cohort(open_tiles(tiles), tiles_per_slide)
    found.save(out, source=tiles)
    print(f"Staining of {found.slides} slides ({found.tiles} tiles with tissue) in {out}")
    return 0


def phantom(
    out: str,
    *,
    cases: int = 4,
    stainings: list[str] = ["HE", "violet"],  # noqa: B006 (never changed; jsonargparse wants a list)
    scanners: list[str] = ["S50", "S45"],  # noqa: B006
    size_um: float = 1300.0,
    quality: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Make slides of procedural H&E.

    Args:
        out: Folder for slides, class maps and slides.csv.
        cases: Number of tissues.
        stainings: Names of stainings, as HE,violet.
        scanners: Names of scanners, as S50,S45.
        size_um: Side of a slide in microns.
        quality: JPEG quality; by default the scanner's.
        seed: Decides everything.
        overwrite: Write anew over other settings.
    """
    from pathokd.phantom import write_cohort

    path = write_cohort(
        out,
        cases=cases,
        stainings=stainings,
        scanners=scanners,
        size_um=size_um,
        quality=quality,
        seed=seed,
        overwrite=overwrite,
    )
    print(f"{cases * len(stainings) * len(scanners)} slides of {cases} cases in {path}")
    return 0


def embed(
    model: str,
    slides: list[str],
    *,
    out: str,
    readout: Literal["cls", "mean", "cls+mean"] = "cls",
    mpp: Mpp | None = None,
    tile_px: int | None = None,
    min_tissue: float | None = None,
    mpp_level0: Mpp | None = None,
    batch_size: int = 32,
    workers: int = 2,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    dtype: Literal["fp16", "fp32"] = "fp32",
    device: str = "auto",
    compile: bool = False,
    shard: str = "0/1",
    engine: Literal["local", "ray"] = "local",
    overwrite: bool = False,
    skip_errors: bool = False,
) -> int:
    """Write one HDF5 of features per slide.

    Args:
        model: An exported folder, a card's name, hf-hub:OWNER/NAME, or an encoder that an installed package offers.
        slides: A folder of `pathokd tile` or its manifest; or slides, which are tiled first, into OUT/tiles.
        out: Folder for SLIDE_ID.h5 and summary.csv.
        readout: How tokens become one vector.
        mpp: Microns per pixel for slides; by default the model's.
        tile_px: Side of a tile for slides; by default the model's input.
        min_tissue: Least share of a tile that is tissue, for slides; by default 0.25.
        mpp_level0: Microns per level-0 pixel for slides that do not say.
        batch_size: Tiles per forward pass.
        workers: Reading threads.
        precision: Arithmetic; auto is bf16 where the device is fast in it.
        dtype: Precision of the stored features.
        device: auto or a torch device.
        compile: Let torch compile the model, which takes a minute once.
        shard: I/N embeds every N-th slide of a tiled folder from the I-th on (from 0), for N machines or jobs.
        engine: local; or ray, the cluster that RAY_ADDRESS names, else this machine, one GPU or WORKERS CPUs a slide.
        overwrite: Redo what is done.
        skip_errors: Exit with 0 although a slide failed.
    """
    from pathokd.embed.run import embed_slides, summary_name
    from pathokd.models import open_model

    if engine == "local":  # a cluster's workers have devices of their own
        device_for(device, precision)
    encoder = open_model(model)
    tiles, code = slides[0], 0
    number, _, shards = shard.partition("/")
    if not (number.isdecimal() and shards.isdecimal()):
        raise ValueError(f"--shard takes I/N, such as 3/16, got {shard!r}.")
    if not (len(slides) == 1 and (Path(tiles).suffix == ".parquet" or (Path(tiles) / "manifest.parquet").is_file())):
        if shards != "1":
            raise ValueError("--shard shares out a tiled folder: run `pathokd tile` first, once.")
        tiles = f"{out}/tiles"
        code = tile(
            slides,
            out=tiles,
            mpp=(encoder.card.mpp or 0.5) if mpp is None else mpp,
            tile_px=encoder.card.image_px if tile_px is None else tile_px,
            min_tissue=0.25 if min_tissue is None else min_tissue,
            mpp_level0=mpp_level0,
            overwrite=overwrite,
            skip_errors=skip_errors,
        )
    elif any(given is not None for given in (mpp, tile_px, min_tissue, mpp_level0)):
        raise ValueError(
            f"{tiles} is tiled already: --mpp, --tile-px, --min-tissue and --mpp-level0 are for slides; leave them out."
        )
    summary = embed_slides(
        encoder,
        tiles,
        out,
        readout=readout,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        dtype=dtype,
        device=device,
        compile=compile,
        overwrite=overwrite,
        shard=(int(number), int(shards)),
        engine=engine,
    )
    failed = int((summary["status"] == "failed").sum())
    print(f"{summary['n_tiles'].sum()} tiles of {len(summary) - failed} slides embedded in {out}")
    where = f"{out}/{summary_name(int(number), int(shards))}"
    return max(code, slides_outcome(failed, len(summary), where, skip_errors))


def verify(folder: str, *, skip_errors: bool = False) -> int:
    """Check features.

    Args:
        folder: What `pathokd embed` wrote.
        skip_errors: Exit with 0 although the run itself could not read some slides.
    """
    from pathokd.embed.verify import verify_embeddings

    found = verify_embeddings(folder)
    for row in found[found["status"] != "ok"].itertuples():
        print(f"{row.slide_id}: {row.status}: {row.message}")
    good = found[found["status"] == "ok"]
    flagged = int(good["n_flagged"].sum())
    print(f"{len(good)} of {len(found)} slides are sound: {good['n_tiles'].sum()} tiles, {flagged} of them flagged.")
    fine = ("ok", "failed") if skip_errors else ("ok",)
    return 0 if found["status"].isin(fine).all() else 1


def doctor() -> int:
    """Look at versions, readers, devices and weights; nothing is fetched."""
    from pathokd.embed.doctor import examine

    found = examine()
    for topic in dict.fromkeys(finding.topic for finding in found):
        print(f"{topic}:")
        for finding in found:
            if finding.topic == topic:
                print(f"  {'' if finding.fine else 'TROUBLE: '}{finding.text}")
    return 0 if all(finding.fine for finding in found) else 1
