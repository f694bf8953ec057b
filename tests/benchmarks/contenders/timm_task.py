"""timm's own distillation: `timm.task.FeatureDistillationTask` (MSE of pooled features) in the loop its docs show.

Usage: python timm_task.py JOB.json, written by `test_training.py` or `test_budget.py`.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.task import FeatureDistillationTask
from torch import nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(job: dict) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as `pathokd fit` sets it
    teacher_args, student_args = job.get("teacher_args", {}), job.get("student_args", {})
    teacher = timm.create_model(job["teacher_architecture"], num_classes=0, **teacher_args).requires_grad_(False)
    teacher.load_state_dict(load_file(job["teacher"]))
    # The task wants logits and labels; two classes with weight 0 cost nothing.
    student = timm.create_model(job["student_architecture"], num_classes=2, **student_args)
    task = FeatureDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=0.0, verbose=False
    ).train()
    parameters = list(task.trainable_module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=job.get("lr", 5e-4), weight_decay=0.04)
    tiles = torch.from_numpy(np.load(job["tiles"])).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)

    stamps = []
    for rows in itertools.chain.from_iterable(
        torch.randperm(len(tiles)).split(job["batch_size"]) for _ in range(job.get("epochs", 1))
    ):
        images = (tiles[rows].float() / 255 - mean) / std
        loss = task(images, torch.zeros(len(rows), dtype=torch.long))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        stamps.append(time.perf_counter())

    if "save" in job:
        save_file(student.state_dict(), job["save"])
    facts = {"stamps": stamps, "loss": loss.item(), "trainable": sum(p.numel() for p in parameters)}
    Path(job["out"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
