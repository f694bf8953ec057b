"""The parts of the robust recipe on real tiles: equal steps from the same student, two teachers, paired intervals.

    PATHOKD_REAL_DATA=../shared/data python tests/benchmarks/ablation_robust_real.py vits --seeds 0
    PATHOKD_REAL_DATA=../shared/data python tests/benchmarks/ablation_robust_real.py embedded --seeds 0

`vits` is the saliency-tuned ViT-S/14 after block 6, `embedded` is tile_data/teacher; each goes into three of its own
blocks, or `--depth` of them. Learnt on: the real fields of configs/distill/embedded_teacher.csv less `HELD_OUT`; clean
targets, perturbed student, then the arms of ablation_robust.py on the same tiles under simulated stainings and
scanners. Measured on `HELD_OUT` and CAMELYON17 under others (real_measures.py), and on PathMNIST. The embedded teacher
itself, unlike its students, has seen HELD_OUT. Finished runs are kept, so a run that was stopped goes on, and arms or
seeds may be added; another length, set of magnifications, depth, rate, start or strength has its own folder.
"""

import argparse
import copy
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from ablation import ROOT, pathokd
from ablation_robust import BEGIN, configure, fit, slug
from real_measures import COLUMNS, Registered, difference, load, load_teacher, measure, registered_tiles, save, value

from pathokd.data.conditions import conditions
from pathokd.data.simulate import simulate_tiles
from pathokd.data.wsi import WsiTiles, read_manifest
from pathokd.embed import Embedder
from pathokd.export import export_student
from pathokd.models import StudentSpec, build_student, load_encoder
from pathokd.models.device import bf16_time
from pathokd.slides.manifest import TileManifest, join_manifests

FIRST = yaml.safe_load((ROOT / "configs/distill/quickstart_cached.yaml").read_text(encoding="utf-8"))
CONTROL = "clean / perturbed, longer (the control)"
ARMS: dict[str, list[str]] = {
    CONTROL: [],
    "clean / perturbed, five times as long": ["longer"],
    "the first stage once more, half as long": ["again"],
    "once more, a third as long, views at half strength": ["again", "gentle"],
    "consistency and relations in the first stage": ["whole", "consistency", "relations"],
    "consistency in the first stage": ["whole", "consistency"],
    "relations in the first stage": ["whole", "relations"],
    "consistency and relations in the first stage, then pairs": ["whole", "consistency", "relations", "pairs"],
    "+ consistency": ["consistency"],
    "+ registered simulated pairs, weight .3": ["pairs"],
    "+ registered simulated pairs, weight .1": ["pairs", "light"],
    "+ denoised targets, 4 directions": ["denoise4"],
    "+ relations, balanced": ["relations"],
    "+ consistency + denoised": ["consistency", "denoise4"],
    "+ consistency + relations": ["consistency", "relations"],
    "+ pairs, weight .1, + relations": ["pairs", "light", "relations"],
    "+ pairs, weight .3, + relations": ["pairs", "relations"],
    "+ pairs, weight .3, + consistency": ["pairs", "consistency"],
    "+ pairs, weight .3, + consistency + relations": ["pairs", "consistency", "relations"],
    "+ registered tiles with the targets of the originals": ["reference"],
    "+ pairs, weight .3, targets of the originals": ["pairs", "reference"],
    "+ pairs, weight .1, targets of the originals": ["pairs", "light", "reference"],
    "+ restaining, in 70 % of views": ["restained"],
    "+ restaining + pairs, weight .1": ["restained", "pairs", "light"],
}
HELD_OUT = (
    "cmu1_section4", "birl_kidney_he", "birl_kidney_panck", "histoqc_3", "histoqc_4", "tiatoolbox_target",
    "instanseg_core",
)  # fmt: skip
LEARN_STAINS, LEARN_SCANNERS = ["tcga-frozen", "histoqc-1"], ["pale", "fringed"]
"""Of the simulated pairs; real_measures.py has those that measure."""
PRECISION: Literal["bf16", "fp32"] = "bf16" if bf16_time() < 1 else "fp32"
"""Of everything: what the machine is faster in."""
TEACHER = "the teacher itself"
ALONE = {TEACHER: "teacher", "the blocks it starts from, untrained": "start"}
"""Models that no seed touches, and how they are kept."""
SMALL = 100
"""Slides of fewer tiles take part whole."""


class Student(NamedTuple):
    """How a teacher's student is built and begins."""

    spec: dict[str, Any]
    lr: float


STUDENTS = {
    "vits": Student(
        {
            "architecture": "vit_small_patch14_dinov2", "model_args": {"depth": 3, "dynamic_img_size": True},
            "image_px": 224, "mpp": 0.5,
        },
        lr=1e-4,
    ),
    "embedded": Student({k: v for k, v in FIRST["model"]["student"].items() if k != "init"}, lr=1e-3),
}  # fmt: skip


class Sizes(NamedTuple):
    """How much is done; tiles that are there were drawn by the sizes of their first run."""

    tiles: int
    stride: int
    more_mpp: tuple[float, ...]
    places: int
    measured: int
    first_steps: int
    steps: int

    @property
    def also(self) -> str:
        """Names the other magnifications."""
        return "mpp" + "_".join(f"{mpp:g}" for mpp in self.more_mpp)

    @property
    def originals(self) -> str:
        """Folder of the first stage's tiles."""
        return f"originals_{self.also}" if self.more_mpp else "originals"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=list(STUDENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), help="none: the first stage alone")
    parser.add_argument("--tiles", type=int, default=2400, help="learnt on")
    parser.add_argument("--stride", type=int, default=224, help="pixels between them; under 224 they overlap")
    parser.add_argument(
        "--more-mpp",
        type=float,
        nargs="+",
        default=[],
        help="other magnifications of the slides in the first stage, each at most half as many tiles as at 0.5 um/px",
    )
    parser.add_argument("--places", type=int, default=500, help="of them, seen under simulated conditions in the arms")
    parser.add_argument("--measured", type=int, default=150, help="of HELD_OUT; 100 crops of CAMELYON17 come on top")
    parser.add_argument("--first-steps", type=int, help="by default 1000")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--depth", type=int, help="blocks of the student, by default 3")
    parser.add_argument("--lr", type=float, help="of the first stage; by default 1e-4 for vits, 1e-3 for embedded")
    parser.add_argument("--solve-tiles", type=int, help="on which projectors are solved first, by default 0")
    parser.add_argument("--strength", type=float, help="of the first stage's views, by default 1; 0: clean")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation/robust_real")
    args = parser.parse_args()
    first_steps = 1000 if args.first_steps is None else args.first_steps
    sizes = Sizes(args.tiles, args.stride, tuple(args.more_mpp), args.places, args.measured, first_steps, args.steps)
    shared, data = args.out.resolve(), Path(os.environ["PATHOKD_REAL_DATA"])
    built, folder = STUDENTS[args.teacher], args.teacher
    if args.depth is not None:
        built.spec["model_args"]["depth"], folder = args.depth, f"{folder}_depth{args.depth}"
    if args.first_steps is not None:
        folder = f"{folder}_steps{first_steps}"
    if args.more_mpp:
        folder = f"{folder}_{sizes.also}"
    if args.lr is not None:
        STUDENTS[args.teacher], folder = built._replace(lr=args.lr), f"{folder}_lr{args.lr:g}"
    if args.solve_tiles is not None:
        FIRST["model"]["projector"] = {"solve_tiles": args.solve_tiles}
        folder = f"{folder}_solve{args.solve_tiles}"
    if args.strength is not None:
        views = FIRST["data"]["photometric"]["student"][0]["init_args"]
        views["strength"], folder = args.strength, f"{folder}_strength{args.strength:g}"
    out = shared / folder
    tiles = prepare(shared, out, args.teacher, data, sizes)
    start(out, STUDENTS[args.teacher])
    score(out, {"teacher": out / "teacher", "start": out / "start"}, tiles, data)
    for seed in args.seeds:
        recipe = train_first(shared, out, args.teacher, seed, sizes)
        score(out, {f"first_{seed}": out / f"first/{seed}"}, tiles, data)
        print(f"\n{table(out)}", flush=True)
        for arm in args.arms:
            student = out / "students" / f"{slug(ARMS[arm])}_{seed}"
            train_arm(recipe, shared, out, args.teacher, arm, seed, sizes)
            score(out, {student.name: student}, tiles, data)
            print(f"\n{table(out)}", flush=True)


def prepare(shared: Path, out: Path, teacher: str, data: Path, sizes: Sizes) -> Registered:
    """Tiles to learn on, the teacher as a folder, its targets and directions; returns the tiles to measure on."""
    manifest = tiled(shared / "tiles", 224)
    learnt = manifest if sizes.stride == 224 else tiled(shared / "tiles_learnt", sizes.stride)
    held, kept = (each.frame["slide_id"].isin(HELD_OUT) for each in (manifest, learnt))
    learn = drawn(learnt.frame[~kept], sizes.tiles)
    magnifications = [dataclasses.replace(learnt, frame=learn)]
    for mpp in sizes.more_mpp:
        other = tiled(shared / f"tiles_{mpp:g}", 224, mpp)
        frame = drawn(other.frame[~other.frame["slide_id"].isin(HELD_OUT)], len(learn) // 2)
        magnifications.append(dataclasses.replace(other, frame=frame))
    places = learn.sample(min(sizes.places, len(learn)), random_state=0).sort_index()
    simulated = dataclasses.replace(learnt, frame=places)
    for name, cut, wanted in (
        (sizes.originals, join_manifests(magnifications), []),
        ("packed", simulated, conditions(LEARN_STAINS, LEARN_SCANNERS, 1.0)),
    ):
        if not (shared / name / "index.parquet").is_file():
            simulate_tiles(WsiTiles(cut), shared / name, wanted, workers=1)
    if not (out / "teacher/config.json").is_file():
        if teacher == "vits":
            export_student(load_teacher(data), out / "teacher", licence="Apache-2.0")
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / "teacher").symlink_to(ROOT / "tile_data/teacher")
    fast = ["--precision", PRECISION, "--workers", 1]
    for name, targets in ((sizes.originals, "first_targets"), ("packed", "targets")):
        words = ["--tokens", "patches", "--out", out / targets, *fast]
        pathokd("cache", out / "teacher", shared / name, *words)
    words = ["--rank", 4, "--max_places", 200, "--out", out / "denoise4.safetensors", *fast]
    pathokd("denoise", out / "teacher", shared / "packed", *words)
    measured = drawn(manifest.frame[held], sizes.measured)
    return registered_tiles(WsiTiles(dataclasses.replace(manifest, frame=measured)), data)


def start(out: Path, built: Student) -> None:
    """What every first stage begins with, as a folder."""
    if not (out / "start/config.json").is_file():
        spec = StudentSpec(**built.spec, init="teacher-layers")
        encoder = build_student(spec, load_encoder(str(out / "teacher")))
        export_student(encoder, out / "start", licence="Apache-2.0")


def tiled(folder: Path, stride: int, mpp: float = 0.5) -> TileManifest:
    """The slides in tiles, cut once."""
    if not (folder / "manifest.parquet").is_file():
        words = ["--out", folder, "--stride", stride, "--mpp", mpp, "--skip-errors"]
        words += ["--allow-upsampling"] if mpp < 0.5 else []
        pathokd("tile", ROOT / "configs/distill/embedded_teacher.csv", *words)
    return read_manifest(folder)


def drawn(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    """`n` good tiles: small slides whole, as far as they fit, the rest drawn from the large ones."""
    good = frame[frame["flag"] == ""]
    few = good.groupby("slide_id")["x"].transform("size") < SMALL
    small = good[few].sample(min(n, int(few.sum())), random_state=0)
    large = good[~few].sample(min(n - len(small), int((~few).sum())), random_state=0)
    return pd.concat([small, large]).sort_index().reset_index(drop=True)


def train_first(shared: Path, out: Path, teacher: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The first stage, which the arms of a seed share; kept where it is there. Returns its recipe."""
    built = STUDENTS[teacher]
    recipe = copy.deepcopy(FIRST)
    named = {"weights": str(out / "teacher"), "precision": PRECISION, "targets": str(out / "first_targets")}
    recipe["model"] |= {"teachers": {"embedded": named}, "student": {**built.spec, "init": "teacher-layers"}}
    recipe["model"]["optim"]["lr"] = built.lr
    recipe["model"]["ema_momentum"] = 2 * [sizes.first_steps / (sizes.first_steps + 20)]  # ends 20 steps behind
    recipe["data"] |= {"tiles": str(shared / sizes.originals), "val_fraction": 0.0, "workers": 0}
    fit(seeded(recipe, seed, sizes.first_steps), out, f"first_{seed}", out / f"first/{seed}")
    return recipe


def train_arm(recipe: dict[str, Any], shared: Path, out: Path, teacher: str, arm: str, seed: int, sizes: Sizes) -> None:
    """The arm's own steps, after the first stage of the seed, whose recipe is given; kept where they are there."""
    built, first, recipe = STUDENTS[teacher], out / f"first/{seed}", copy.deepcopy(recipe)
    name = f"{slug(ARMS[arm])}_{seed}"
    if "again" in ARMS[arm]:
        recipe["model"]["student"]["init"] = str(first)
        if "gentle" in ARMS[arm]:
            recipe["data"]["photometric"]["student"][0]["init_args"]["strength"] = 0.5
        steps = sizes.first_steps // (3 if "gentle" in ARMS[arm] else 2)
        fit(seeded(recipe, seed + 1000, steps), out, name, out / "students" / name)  # of other views
        return
    parts = ARMS[arm]
    if "whole" in parts:  # terms of the arm from the first step on, at equal steps
        terms = [part for part in parts if part != "pairs"]
        recipe = configure(recipe, out, terms, shared / sizes.originals)
        recipe["model"]["teachers"]["embedded"]["targets"] = str(out / "first_targets")
        name = f"{slug(terms)}_{seed}"
        first = out / "students" / name
        fit(seeded(recipe, seed, sizes.first_steps), out, name, first)
        if terms == parts:
            return
        parts, name = ["pairs"], f"{slug(parts)}_{seed}"
    recipe = configure(copy.deepcopy(BEGIN), out, parts, shared / "packed")
    recipe["model"]["student"] = {**built.spec, "init": str(first)}
    steps = sizes.steps * (5 if "longer" in ARMS[arm] else 1)
    fit(seeded(recipe, seed, steps), out, name, out / "students" / name)


def seeded(recipe: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    recipe["data"]["seed"] = recipe["seed_everything"] = seed
    recipe["trainer"] |= {"max_steps": steps, "precision": "bf16-mixed" if PRECISION == "bf16" else "32-true"}
    return recipe


def score(out: Path, models: dict[str, Path], tiles: Registered, data: Path) -> None:
    """Measure the models that were not measured yet."""
    for name, path in models.items():
        kept = out / f"scores/{name}.npz"
        if not kept.is_file():
            save(kept, measure(Embedder(str(path), precision=PRECISION), tiles, data))


def table(out: Path) -> str:
    """What all students that are there reach, and by how much they differ from their teacher and from the control."""
    scores = {path.stem: load(path) for path in sorted((out / "scores").glob("*.npz"))}
    rows = {**ALONE, "before": "first", **{arm: slug(parts) for arm, parts in ARMS.items()}}
    seeds = {
        arm: {name.rpartition("_")[2]: scores[name] for name in scores if kind in (name, name.rpartition("_")[0])}
        for arm, kind in rows.items()
    }
    heading = ["| | seeds | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    lines = list(heading)
    for arm, found in seeds.items():
        if found:
            values = np.array([[value(each[key]) for key in COLUMNS.values()] for each in found.values()])
            spread = [f" ({short(s)})" for s in values.std(0, ddof=1)] if len(found) > 1 else [""] * len(COLUMNS)
            cells = [f"{short(mean)}{sd}" for mean, sd in zip(values.mean(0), spread, strict=True)]
            lines.append(f"| {arm} | {len(found) if arm not in ALONE else ''} | " + " | ".join(cells) + " |")
    for reference in (TEACHER, CONTROL):
        if not seeds[reference]:
            continue
        lines += ["", f"Minus {reference}, with 95 % intervals:", "", *heading]
        for arm, found in seeds.items():
            against = seeds[reference]
            shared = [seed for seed in found if reference != CONTROL or seed in against]
            if arm in (reference, TEACHER) or not shared:
                continue
            others = [against[seed] for seed in shared] if reference == CONTROL else list(against.values())
            cells = []
            for key in COLUMNS.values():
                mean, low, high = difference([found[seed][key] for seed in shared], [each[key] for each in others])
                cells.append(f"{short(mean)} ({short(low)} to {short(high)})")
            lines.append(f"| {arm} | {len(shared)} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    return text


def short(number: float) -> str:
    """Three digits, and no nought before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.3f}").replace("-.000", ".000")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
