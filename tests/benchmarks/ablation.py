"""The ablation of the views: one budget, three ways, several seeds, and the table of what came of it.

    python tests/benchmarks/ablation.py phantom --seeds 0 1 2 --out runs/ablation/phantom
    PATHOKD_REAL_DATA=../shared/data python tests/benchmarks/ablation.py real --seeds 0 --out runs/ablation/real

Arms: `same` (both see clean tiles), `both` (both see the same perturbed tiles), `clean_perturbed` (clean teacher,
perturbed student). Finished runs are kept, so a run that was stopped goes on. Prints a Markdown table for RESULTS.md.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from real_measures import crops, load_teacher, same_centre, shown

from pathokd.embed import Embedder
from pathokd.evaluate import probe_images

ROOT = Path(__file__).parents[2]
ARMS: dict[str, list[str]] = {
    "same": ["configs/override/views_same.yaml"],
    "both": ["configs/override/views_both.yaml"],
    "clean_perturbed": [],
}
COLUMNS = {
    "probe": "probe_accuracy",
    "10-NN": "probe_knn10",
    "top-10 across scanners": "top10_cross_scanner",
    "separation": "cross_scanner_separation",
    "top-10 across stainings": "top10_cross_staining",
    "separation ": "cross_staining_separation",
}
"""Of a table of phantoms: heading to what `pathokd compare` calls it."""


def pathokd(*words: object) -> None:
    command = [sys.executable, "-m", "pathokd.cli", *map(str, words)]
    print("$ pathokd", *words, flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(config: str, tiles: Path, out: Path, seeds: list[int], extra: list[str]) -> dict[str, Path]:
    """Fit and export every arm and seed that is not there yet; name to student."""
    students = {}
    for seed, (arm, overrides) in itertools.product(seeds, ARMS.items()):
        name = f"{arm}_{seed}"
        run, student = out / f"run_{name}", out / f"student_{name}"
        students[name] = student
        if (student / "config.json").is_file():
            continue
        resume = ["--resume", "true"] if (run / "checkpoints/last.ckpt").is_file() else []
        layered = [word for path in overrides for word in ("--config", path)]
        words = ["--data.tiles", tiles, "--data.seed", seed, "--seed_everything", seed, "--out", run]
        pathokd("fit", "--config", config, *layered, *words, *extra, *resume)
        pathokd("export", run, "--out", student, "--which", "last", "--overwrite")
    return students


def table(scores: dict[str, dict[str, float]], seeds: list[int], fixed: tuple[str, ...]) -> str:
    """One line per model or arm; arms as mean (standard deviation) over seeds."""
    columns = list(next(iter(scores.values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name in fixed:
        lines.append(f"| {name} | " + " | ".join(f"{scores[name][column]:.3f}" for column in columns) + " |")
    for arm in ARMS:
        cells = []
        for column in columns:
            values = [scores[f"{arm}_{seed}"][column] for seed in seeds]
            spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append(f"| {arm.replace('_', ' / ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def registered(models: dict[str, Any], packed: Path, out: Path) -> dict[str, dict[str, Any]]:
    """`pathokd compare` of all models on registered, labelled tiles."""
    named = [f"{name}={path}" for name, path in models.items()]
    pathokd("compare", *named, "--data", packed, "--out", out)
    return json.loads(out.read_text())


def phantom(out: Path, seeds: list[int], extra: list[str]) -> str:
    """Embedded teacher, quickstart's recipe and slides."""
    pathokd("tile", "tile_data/phantom/slides.csv", "--out", out / "tiles")
    pathokd("pack", out / "tiles", "--out", out / "packed")
    teacher = {"teacher": ROOT / "tile_data/teacher"}
    students = train("configs/distill/quickstart.yaml", out / "packed", out, seeds, extra)
    found = registered({**teacher, **students}, out / "packed", out / "comparison.json")
    scores = {name: {label: row[key] for label, key in COLUMNS.items()} for name, row in found.items()}
    return table(scores, seeds, ("teacher",))


def real(out: Path, seeds: list[int], extra: list[str]) -> str:
    """The saliency-tuned ViT-S on real tiles; measured on CAMELYON17, PathMNIST and simulated scanners."""
    data = Path(os.environ["PATHOKD_REAL_DATA"])
    pathokd("tile", "configs/distill/embedded_teacher.csv", "--out", out / "tiles", "--skip-errors")
    pathokd("pack", out / "tiles", "--out", out / "packed")
    students = train("configs/distill/real_vits_views.yaml", out / "packed", out, seeds, extra)
    models: dict[str, Any] = {"teacher": load_teacher(data), **{name: str(path) for name, path in students.items()}}
    simulated = simulated_camelyon(data)
    scores = {}
    for name, model in models.items():
        embedder = Embedder(model)
        probe = probe_images(model, data / "tiles_pathmnist1k/pathmnist_train1000.npz")
        scores[name] = {
            "PathMNIST probe": probe.accuracy,
            "PathMNIST 10-NN": probe.knn10_accuracy,
            "nearest of the same centre": centre_boundness(embedder, data),
            **simulated_retrieval(embedder, simulated),
        }
        print(name, scores[name], flush=True)
    (out / "scores.json").write_text(json.dumps(scores, indent=2))
    return table(scores, seeds, ("teacher",))


def centre_boundness(embedder: Embedder, data: Path) -> float:
    """Share of crops whose nearest neighbour from another tile is of the same centre; chance is 4/24."""
    images, centres, tiles = crops(data)
    return float(same_centre(embedder(shown(images)), centres, tiles).mean())


def simulated_camelyon(data: Path) -> dict[str, np.ndarray]:
    """The crops as they are, and under two scanner profiles and two stainings."""
    from pathokd.augment import PROFILES, STAININGS, measure_appearance, swap_stain

    images, _, _ = crops(data)
    images = shown(images)
    found = {"original": images}
    for name in ("soft-warm", "sharp-blue"):
        profile = PROFILES[name]
        found[f"scanner {name}"] = np.stack([profile.apply(tile, seed=i) for i, tile in enumerate(images)])
    for name in ("h-long-e-short", "birl-kidney"):
        target = STAININGS[name].appearance
        found[f"staining {name}"] = np.stack([swap_stain(tile, measure_appearance(tile), target) for tile in images])
    return found


def simulated_retrieval(embedder: Embedder, simulated: dict[str, np.ndarray]) -> dict[str, float]:
    """Top-1 of the same crop and separation between the original and each simulated condition, means by kind."""
    import torch

    from pathokd.metrics import paired_topk, separation

    x = {name: torch.from_numpy(embedder(images)) for name, images in simulated.items()}
    found = {}
    for kind in ("scanner", "staining"):
        names = [name for name in x if name.startswith(kind)]
        found[f"top-1, simulated {kind}s"] = float(np.mean([float(paired_topk(x["original"], x[n], 1)) for n in names]))
        found[f"separation, {kind}s"] = float(np.mean([float(separation(x["original"], x[n])) for n in names]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("phantom", "real"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("extra", nargs=argparse.REMAINDER, help="more options for `pathokd fit`, after --")
    args = parser.parse_args()
    out = (args.out or ROOT / f"runs/ablation/{args.which}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = {"phantom": phantom, "real": real}[args.which](
        out, args.seeds, [word for word in args.extra if word != "--"]
    )
    print(f"\n{result}")
    (out / "table.md").write_text(result + "\n")


if __name__ == "__main__":
    main()
