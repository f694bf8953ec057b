"""After an equal number of tiles: how much of the teacher's class token is in the class token of each one's student.

The embedded teacher into three blocks of its kind, all from scratch, on the same tiles of a real slide. A student is
what its makers say to load. Its class token (192 numbers) is mapped onto the teacher's standardised one by ridge
regression on training tiles, the same for all, and the cosine is taken on tiles that nobody trained on. Nothing here is
about speed, so the machine need not be quiet.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import RidgeCV

from pathokd.cli.main import main
from pathokd.data.packed import PackedTiles
from pathokd.embed import Embedder, embed_packed
from pathokd.files import write_json
from pathokd.models import Encoder, StudentSpec, build_student, load_encoder
from pathokd.slides.manifest import TileSpec

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3 * 3600)]

TRAIN = int(os.environ.get("PATHOKD_BENCH_TILES", "768"))
HELD_OUT, EPOCHS, BATCH_SIZE, LR = 256, 4, 16, 1e-3
SOLVE_TILES = 256
TEACHER = Path(__file__).parents[2] / "tile_data/teacher"
ARCHITECTURE = "vit_tiny_patch16_224"
TEACHER_ARGS = {"patch_size": 14, "reg_tokens": 4, "no_embed_class": True}
STUDENT_ARGS = {**TEACHER_ARGS, "depth": 3}
LABELS = {
    "untrained": "no training at all",
    "fit": "`pathokd fit`, class and patch tokens, EMA exported",
    "fit_solved": f"the same with {SOLVE_TILES} of the tiles spent on `model.projector.solve_tiles`",
    "timm": "timm.task.FeatureDistillationTask, class token",
    "lightly": "lightly-train, distillationv3, its own learning rate for this batch",
    "lightly_lr": "the same with the learning rate of the others",
}


@pytest.fixture(scope="module")
def work(bench_slide: Path, cut_tiles: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Training tiles packed, decoded and as files; the teacher in the formats that each wants."""
    folder = tmp_path_factory.mktemp("budget")
    packed = cut_tiles(bench_slide, folder, TileSpec(), TRAIN + HELD_OUT)
    assert len(packed) == TRAIN + HELD_OUT, f"the slide has {len(packed)} tiles, set PATHOKD_BENCH_TILES lower"
    # Tiles come in rows from top to bottom: the lower end of the section is held out.
    train = cut_tiles(bench_slide, folder / "train", TileSpec(), TRAIN)
    (folder / "files").mkdir()
    for row in range(TRAIN):
        (folder / "files" / f"{row:05d}.jpg").write_bytes(train.read_encoded(row))
    weights = load_file(TEACHER / "model.safetensors")
    save_file(weights, folder / "teacher.safetensors")
    torch.save(weights, folder / "teacher.pt")
    return {"folder": folder, "packed": packed}


def fit(work: dict[str, Any], name: str = "fit", solve_tiles: int = 0) -> Encoder:
    folder: Path = work["folder"]
    config = {
        "model": {
            "teachers": {"embedded": {"weights": str(TEACHER)}},
            "student": {"architecture": ARCHITECTURE, "model_args": STUDENT_ARGS, "init": "scratch"},
            "objectives": [
                {"loss": {"class_path": "pathokd.losses.CosineSmoothL1"}, "tokens": "cls"},
                {"loss": {"class_path": "pathokd.losses.CosineSmoothL1"}, "tokens": "patches"},
            ],
            "optim": {"lr": LR, "warmup": 0.08, "weight_decay": [0.04, 0.04]},
            "projector": {"solve_tiles": solve_tiles},
            "standardize_steps": 20,
            "ema_momentum": [0.9, 0.9],
        },
        "data": {"tiles": str(folder / "train/packed"), "batch_size": BATCH_SIZE, "val_fraction": 0.0},
        "trainer": {"max_steps": (EPOCHS * TRAIN - solve_tiles) // BATCH_SIZE, "accelerator": "cpu"},
    }
    write_json(folder / f"{name}.yaml", config)
    assert main(["fit", "--config", str(folder / f"{name}.yaml"), "--out", str(folder / name)]) == 0
    assert main(["export", str(folder / name), "--out", str(folder / f"{name}_student"), "--which", "last"]) == 0
    return load_encoder(str(folder / f"{name}_student"))


def timm_task(work: dict[str, Any], run_script: Any) -> Encoder:
    folder: Path = work["folder"]
    job = {
        "teacher": str(folder / "teacher.safetensors"),
        "teacher_architecture": ARCHITECTURE,
        "teacher_args": TEACHER_ARGS,
        "student_architecture": ARCHITECTURE,
        "student_args": STUDENT_ARGS,
        "tiles": str(folder / "train/tiles.npy"),
        "batch_size": BATCH_SIZE,
        "epochs": EPOCHS,
        "lr": LR,
        "save": str(folder / "timm.safetensors"),
    }
    facts = run_script("timm_task", job, folder)
    assert len(facts["stamps"]) == EPOCHS * TRAIN // BATCH_SIZE
    return with_weights(load_file(folder / "timm.safetensors"))


def lightly(work: dict[str, Any], run_contender: Any, binary: Path, name: str, **more: Any) -> Encoder:
    folder: Path = work["folder"]
    settings = {
        "out": folder / name,
        "data": folder / "files",
        "model": f"timm/{ARCHITECTURE}",
        **{f"model_args.{key}": str(value).lower() for key, value in STUDENT_ARGS.items()},
        "model_args.pretrained": "false",
        "model_args.num_classes": 0,
        "method": "distillationv3",
        "method_args.teacher": f"timm/{ARCHITECTURE}",
        **{f"method_args.teacher_args.{key}": str(value).lower() for key, value in TEACHER_ARGS.items()},
        "method_args.teacher_args.pretrained": "false",
        "method_args.teacher_args.num_classes": 0,
        "method_args.teacher_weights": folder / "teacher.pt",
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "num_workers": 0,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "overwrite": "true",
        **more,
    }
    stopwatch = Path(__file__).parent / "contenders" / "lightly_stopwatch.py"
    out = folder / f"{name}.out.json"
    command = [binary.parent / "python", stopwatch, out, binary, "pretrain"]
    facts = run_contender([*map(str, command), *(f"{key}={value}" for key, value in settings.items())], out)
    assert len(facts["stamps"]) == EPOCHS * TRAIN // BATCH_SIZE
    exported = folder / name / "exported_models/exported_last.pt"
    return with_weights(torch.load(exported, map_location="cpu", weights_only=True))


def with_weights(state: dict[str, torch.Tensor]) -> Encoder:
    """A student of this shape with the weights that another program trained; none of its own may be missing."""
    encoder = untrained()
    encoder.model.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    return encoder


def untrained() -> Encoder:
    return build_student(StudentSpec(ARCHITECTURE, STUDENT_ARGS, image_px=224, mpp=0.5))


def test_cosine_after_an_equal_budget(
    work: dict[str, Any], run_contender: Any, run_script: Any, publish: Any, markdown: Any
) -> None:
    packed: PackedTiles = work["packed"]
    wanted = embed_packed(Embedder(str(TEACHER)), packed).features
    scaled = (wanted - wanted[:TRAIN].mean(0)) / wanted[:TRAIN].std(0)
    students: dict[str, Callable[[], Encoder]] = {
        "untrained": untrained,
        "fit": lambda: fit(work),
        "fit_solved": lambda: fit(work, "fit_solved", SOLVE_TILES),
        "timm": lambda: timm_task(work, run_script),
    }
    binary, notes = os.environ.get("LIGHTLY_TRAIN_BIN"), []
    if binary:
        # It scales its rate by the root of batch / 1536.
        rate = LR * (1536 / BATCH_SIZE) ** 0.5
        students["lightly"] = lambda: lightly(work, run_contender, Path(binary), "lightly")
        students["lightly_lr"] = lambda: lightly(
            work, run_contender, Path(binary), "lightly_lr", **{"optim_args.lr": rate}
        )
    else:
        notes.append("lightly-train left out: LIGHTLY_TRAIN_BIN does not name its executable (see README.md).")
    found = {}
    for name, make in students.items():
        x = embed_packed(Embedder(make()), packed).features
        x = (x - x[:TRAIN].mean(0)) / (x[:TRAIN].std(0) + 1e-6)
        mapped = RidgeCV(np.logspace(-1, 5, 13)).fit(x[:TRAIN], scaled[:TRAIN]).predict(x[TRAIN:])
        cosine = (mapped * scaled[TRAIN:]).sum(1) / np.linalg.norm(mapped, axis=1)
        cosine /= np.linalg.norm(scaled[TRAIN:], axis=1)
        draws = np.random.default_rng(0).choice(cosine, (2000, len(cosine))).mean(1)
        found[name] = (float(cosine.mean()), *np.quantile(draws, [0.025, 0.975]).tolist())
        print(name, found[name], file=sys.stderr, flush=True)
    rows = [[LABELS[name], f"{mean:.3f} ({low:.3f} to {high:.3f})"] for name, (mean, low, high) in found.items()]
    table = markdown(["student", f"cosine to the teacher on {HELD_OUT} tiles held out (95 %)"], rows)
    what = f"{EPOCHS * TRAIN:,} tiles each ({EPOCHS} epochs of {TRAIN}), batch {BATCH_SIZE}, fp32"
    publish("budget", {"cosine": found}, "\n".join([f"Equal budget: {what}", "", table, *notes]))
    others = max(value[0] for name, value in found.items() if not name.startswith("fit"))
    assert found["fit_solved"][0] > others
    assert found["fit"][0] > others
