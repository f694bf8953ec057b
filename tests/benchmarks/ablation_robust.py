"""The parts of the robust recipe, each added to the same base: equal steps, several seeds, one table.

    python tests/benchmarks/ablation_robust.py --seeds 0 1 2 --out runs/ablation/robust

Training and measuring share no case, staining or scanner: students learn on phantoms in two stainings and scanners,
registered with each other, and are measured on tile_data's. Arms are changes of configs/distill/robust_phantom.yaml;
those with a last stage spend a quarter of their steps on it. Finished runs are kept, so a run that was stopped goes on,
and arms or seeds may be added. Prints a Markdown table of the seeds that are there.
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
from ablation import ROOT, pathokd, registered

from pathokd.phantom import write_cohort

RECIPE = yaml.safe_load((ROOT / "configs/distill/robust_phantom.yaml").read_text(encoding="utf-8"))
LAST = yaml.safe_load((ROOT / "configs/distill/robust_phantom_pairs.yaml").read_text(encoding="utf-8"))
ARMS: dict[str, list[str]] = {
    "clean / perturbed": [],
    "+ consistency": ["consistency"],
    "+ denoised targets, 4 directions": ["denoise4"],
    "+ relations, balanced": ["relations"],
    "+ registered pairs at the end": ["pairs"],
    "+ consistency + registered pairs": ["consistency", "pairs"],
    "all": ["consistency", "denoise4", "relations", "pairs"],
}
COLUMNS = {
    "probe": "probe_accuracy",
    "10-NN": "probe_knn10",
    "top-10 across scanners": "top10_cross_scanner",
    "separation": "cross_scanner_separation",
    "top-10 across stainings": "top10_cross_staining",
    "separation ": "cross_staining_separation",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=120)
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
            pathokd("tile", slides, "--out", out / f"{tiles}tiles")
            pathokd("pack", out / f"{tiles}tiles", "--out", out / f"{tiles}packed")
    pathokd("cache", "tile_data/teacher", out / "packed", "--tokens", "patches", "--out", out / "targets")
    for rank in {part.removeprefix("denoise") for parts in ARMS.values() for part in parts if "denoise" in part}:
        words = ["tile_data/teacher", out / "packed", "--rank", rank, "--out", out / f"denoise{rank}.safetensors"]
        pathokd("denoise", *words)


def student(out: Path, arm: str, seed: int) -> Path:
    return out / "students" / f"{slug(arm)}_{seed}"


def slug(arm: str) -> str:
    return "_".join(["base", *ARMS[arm]])


def train(out: Path, arm: str, seed: int, steps: int) -> None:
    parts = ARMS[arm]
    last_steps = steps // 4 if "pairs" in parts else 0
    name = f"{slug(arm)}_{seed}"
    first = configure(copy.deepcopy(RECIPE), out, parts, seed, steps - last_steps)
    if not last_steps:
        fit(first, out, name, student(out, arm, seed))
        return
    # Stages before the last are shared by arms that differ in the last alone.
    before = "_".join(["first", *(part for part in parts if part != "pairs"), str(steps - last_steps), str(seed)])
    fit(first, out, before, out / "stages" / before)
    second = configure(copy.deepcopy(LAST), out, [p for p in parts if "denoise" in p], seed, last_steps)
    second["model"]["student"]["init"] = str(out / "stages" / before)
    fit(second, out, name, student(out, arm, seed))


def configure(recipe: dict[str, Any], out: Path, parts: list[str], seed: int, steps: int) -> dict[str, Any]:
    """The recipe with these parts and no others."""
    model, data = recipe["model"], recipe["data"]
    model["teachers"]["embedded"]["targets"] = str(out / "targets")
    for part in parts:
        if part.startswith("denoise"):
            model["teachers"]["embedded"]["denoise"] = str(out / f"{part}.safetensors")
    if "consistency" not in parts:
        model["objectives"] = [o for o in model["objectives"] if "Consistency" not in o["loss"]["class_path"]]
        data["photometric"].pop("student2", None)
    if "relations" in parts:
        model["objectives"][1]["share"] = 0.25
        relation = {"loss": {"class_path": "pathokd.losses.RKD"}, "view": "student", "share": 0.1875}
        model["objectives"].append(relation)
    data |= {"tiles": str(out / "packed"), "val_fraction": 0.0, "seed": seed, "workers": 0}
    recipe["seed_everything"] = seed
    recipe["trainer"]["max_steps"] = steps
    return recipe


def fit(recipe: dict[str, Any], out: Path, name: str, exported: Path) -> None:
    if (exported / "config.json").is_file():
        return
    path, run = out / "configs" / f"{name}.yaml", out / "runs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    resume = ["--resume", "true"] if (run / "checkpoints/last.ckpt").is_file() else []
    pathokd("fit", "--config", path, "--out", run, "--checkpoint_every", 40, *resume)
    pathokd("export", run, "--out", exported, "--which", "last", "--overwrite")


def measure(out: Path) -> str:
    """The table of all students that are there; each is measured once."""
    kept = out / "scores.json"
    scores = json.loads(kept.read_text()) if kept.is_file() else {}
    models = {"teacher": ROOT / "tile_data/teacher"}
    models |= {path.name: path for path in sorted((out / "students").glob("*_*")) if (path / "config.json").is_file()}
    new = {name: path for name, path in models.items() if name not in scores}
    if new:
        scores |= registered(new, out / "eval_packed", out / "comparison.json")
        kept.write_text(json.dumps(scores, indent=2))
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    for arm in ("the teacher itself", *ARMS):
        names = ["teacher"] if arm not in ARMS else [n for n in scores if n.rpartition("_")[0] == slug(arm)]
        if names:
            values = np.array([[scores[name][key] for key in COLUMNS.values()] for name in names])
            spread = values.std(0, ddof=1) if len(names) > 1 else np.full(len(COLUMNS), math.nan)
            cells = [
                f"{m:.3f}" + ("" if math.isnan(s) else f" ({s:.3f})")
                for m, s in zip(values.mean(0), spread, strict=True)
            ]
            lines.append(f"| {arm} | {len(names) if arm in ARMS else ''} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
