"""The parts of the robust recipe, each added to the same base from the same student: equal steps, one table.

    python tests/benchmarks/ablation_robust.py --seeds 0 1 2 --out runs/ablation/robust

Every arm goes on from the `clean / perturbed` student of ablation.py (the quickstart's recipe, 160 steps) for some
steps with its own parts, so that arms of one seed are paired. These steps see other cases, stainings and scanners than
what is measured on: phantoms in two stainings and two scanners, registered with each other; tile_data's slides measure.
Arms are changes of configs/distill/robust_phantom_pairs.yaml. Finished runs are kept, so a run that was stopped goes
on, and arms or seeds may be added. Prints a Markdown table of what is there.
"""

import argparse
import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ablation import COLUMNS, ROOT, pathokd, registered

from pathokd.phantom import write_cohort

BEGIN = yaml.safe_load((ROOT / "configs/distill/robust_phantom_pairs.yaml").read_text(encoding="utf-8"))
ARMS: dict[str, list[str]] = {
    "clean / perturbed, longer": [],
    "+ registered pairs": ["pairs"],
    "+ consistency": ["consistency"],
    "+ denoised targets, 4 directions": ["denoise4"],
    "+ relations, balanced": ["relations"],
    "+ consistency + denoised targets": ["consistency", "denoise4"],
    "+ consistency + denoised targets + registered pairs, weight 0.1": ["consistency", "denoise4", "pairs", "light"],
    "+ consistency, from the whole quickstart, 80 steps": ["consistency", "long"],
    "+ consistency, from the whole quickstart, 160 steps": ["consistency", "long", "longer"],
    "+ consistency + relations, from the whole quickstart, 80 steps": ["consistency", "relations", "long"],
}
"""What is added. `light`: InfoNCE weighs 0.1, not 0.3. `long`: the first stage has 260 steps and the arm twice as many;
`longer`: the arm four times as many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation/robust")
    args = parser.parse_args()
    out = args.out.resolve()
    prepare(out)
    for seed, arm in itertools.product(args.seeds, args.arms):
        if not (student(out, arm, seed) / "config.json").is_file():
            train(out, arm, seed, args.steps)
            print(f"\n{measure(out)}", flush=True)
    print(f"\n{measure(out)}", flush=True)


def prepare(out: Path) -> None:
    """Slides to learn on, their targets and directions, and slides to measure on."""
    if not (out / "cohort/slides.csv").is_file():
        write_cohort(
            out / "cohort", cases=4, stainings=("E-strong", "blue"), scanners=("S55", "S25"), size_um=1060,
            margin_um=25, region_um=280, quality=68, tile_px=512, seed=2026, overwrite=True,
        )  # fmt: skip
    for tiles, slides in (("", out / "cohort/slides.csv"), ("eval_", "tile_data/phantom/slides.csv")):
        if not (out / f"{tiles}packed/index.parquet").is_file():
            pathokd("tile", slides, "--out", out / f"{tiles}tiles", "--allow-upsampling")  # S55 has .549 um/px
            pathokd("pack", out / f"{tiles}tiles", "--out", out / f"{tiles}packed")
    pathokd("cache", "tile_data/teacher", out / "packed", "--tokens", "patches", "--out", out / "targets")
    for rank in {part.removeprefix("denoise") for parts in ARMS.values() for part in parts if "denoise" in part}:
        words = ["tile_data/teacher", out / "packed", "--rank", rank, "--out", out / f"denoise{rank}.safetensors"]
        pathokd("denoise", *words)


def student(out: Path, arm: str, seed: int) -> Path:
    return out / "students" / f"{slug(ARMS[arm])}_{seed}"


def slug(parts: list[str]) -> str:
    return "_".join(["base", *parts])


def train(out: Path, arm: str, seed: int, steps: int) -> None:
    """The first stage, which the arms of a seed share, and the arm's own steps."""
    long = "long" in ARMS[arm]
    first, first_steps = out / ("first_long" if long else "first") / str(seed), 260 if long else 160
    if not (first / "config.json").is_file():
        words = ["--data.tiles", out / "eval_packed", "--data.seed", seed, "--seed_everything", seed]
        run = out / "runs" / f"{first.parent.name}_{seed}"
        words += ["--trainer.max_steps", first_steps, "--out", run]
        pathokd("fit", "--config", "configs/distill/quickstart.yaml", *words)
        pathokd("export", run, "--out", first, "--which", "last", "--overwrite")
    recipe = configure(copy.deepcopy(BEGIN), out, ARMS[arm], out / "packed")
    recipe["model"]["student"]["init"] = str(first)
    recipe["data"]["seed"] = recipe["seed_everything"] = seed
    recipe["trainer"]["max_steps"] = steps * (2 if long else 1) * (2 if "longer" in ARMS[arm] else 1)
    fit(recipe, out, f"{slug(ARMS[arm])}_{seed}", student(out, arm, seed))


def configure(recipe: dict[str, Any], out: Path, parts: list[str], tiles: Path) -> dict[str, Any]:
    """The recipe with these parts and no others, on packed tiles whose targets and directions are in `out`."""
    model, data = recipe["model"], recipe["data"]
    teacher, objectives = model["teachers"]["embedded"], model["objectives"]
    teacher["targets"] = str(out / "targets")
    data |= {"tiles": str(tiles), "val_fraction": 0.0, "workers": 0}
    if "pairs" not in parts and "reference" not in parts:
        data.pop("registered", None)
    if "pairs" not in parts:
        objectives[:] = [o for o in objectives if "InfoNCE" not in o["loss"]["class_path"]]
    for objective in objectives:
        if "light" in parts and "InfoNCE" in objective["loss"]["class_path"]:
            objective["weight"] = 0.1
    for part in parts:
        if part.startswith("denoise"):
            teacher["denoise"] = str(out / f"{part}.safetensors")
    if "consistency" in parts:
        held = {"class_path": "pathokd.losses.Consistency", "init_args": {"centred": True}}
        objectives.append({"loss": held, "view": ["student", "student2"], "weight": 0.5})
        data["photometric"]["student2"] = data["photometric"]["student"]
    if "reference" in parts:
        data["registered"]["reference"] = ["original", "original"]
    if "restained" in parts:
        data["photometric"]["student"].insert(0, {"class_path": "pathokd.augment.StainSwap", "init_args": {"p": 0.7}})
    if "relations" in parts:
        objectives[1]["share"] = 0.25
        objectives.append({"loss": {"class_path": "pathokd.losses.RKD"}, "view": "student", "share": 0.1875})
    return recipe


def fit(recipe: dict[str, Any], out: Path, name: str, exported: Path) -> None:
    if (exported / "config.json").is_file():
        return
    path, run = out / "configs" / f"{name}.yaml", out / "runs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    resume = ["--resume", "true"] if (run / "checkpoints/last.ckpt").is_file() else []
    pathokd("fit", "--config", path, "--out", run, *resume)
    pathokd("export", run, "--out", exported, "--which", "last", "--overwrite")


def measure(out: Path) -> str:
    """The table of all students that are there; each is measured once."""
    kept = out / "scores.json"
    scores = json.loads(kept.read_text()) if kept.is_file() else {}
    models = {"teacher": ROOT / "tile_data/teacher"}
    models |= {f"first_{path.name}": path for path in sorted((out / "first").glob("*"))}
    models |= {path.name: path for path in sorted((out / "students").glob("*_*")) if (path / "config.json").is_file()}
    new = {name: path for name, path in models.items() if name not in scores}
    if new:
        scores |= registered(new, out / "eval_packed", out / "comparison.json")
        kept.write_text(json.dumps(scores, indent=2))
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    rows = {"the teacher itself": "teacher", "before": "first", **{arm: slug(parts) for arm, parts in ARMS.items()}}
    for arm, kind in rows.items():
        names = [name for name in scores if kind in (name, name.rpartition("_")[0])]
        if names:
            values = np.array([[scores[name][key] for key in COLUMNS.values()] for name in names])
            spread = values.std(0, ddof=1) if len(names) > 1 else np.full(len(COLUMNS), math.nan)
            cells = [
                f"{m:.3f}" + ("" if math.isnan(s) else f" ({s:.3f})")
                for m, s in zip(values.mean(0), spread, strict=True)
            ]
            lines.append(f"| {arm} | {len(names) if kind != 'teacher' else ''} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
