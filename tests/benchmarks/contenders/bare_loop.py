"""The yardstick for training: what a person writes in plain PyTorch and timm, on tiles already decoded.

With `targets` in the job, no teacher is run: its tokens lie in memory too, in the order of the tiles.

Usage: python bare_loop.py JOB.json, written by `test_training.py` or `test_cached.py`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(job: dict) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as `pathokd fit` sets it
    targets = job.get("targets")
    if targets:
        stored = [torch.from_numpy(np.load(f"{targets}/{name}.npy")) for name in ("cls", "patches")]
    else:
        teacher = timm.create_model(job["teacher_architecture"], num_classes=0).eval().requires_grad_(False)
        teacher.load_state_dict(load_file(job["teacher"]))
    student = timm.create_model(job["student_architecture"], num_classes=0, **job.get("student_args", {}))
    dims = student.num_features, stored[0].shape[1] if targets else teacher.num_features
    prefix = student.num_prefix_tokens
    net = nn.ModuleDict({"student": student, "cls": nn.Linear(*dims), "patches": nn.Linear(*dims)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=0.04)
    tiles = torch.from_numpy(np.load(job["tiles"])).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)

    stamps = []
    for rows in torch.randperm(len(tiles)).split(job["batch_size"]):
        images = (tiles[rows].float() / 255 - mean) / std
        if targets:
            target_cls, target_patches = (values[rows].float() for values in stored)
        else:
            with torch.no_grad():
                target = teacher.forward_features(images)
            target_cls, target_patches = target[:, 0], target[:, 1:]
        tokens = student.forward_features(images)
        cls_loss = F.mse_loss(net["cls"](tokens[:, 0]), target_cls)
        patch_cosine = F.cosine_similarity(net["patches"](tokens[:, prefix:]), target_patches, dim=-1)
        loss = cls_loss + (1 - patch_cosine).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 3.0)
        optimizer.step()
        stamps.append(time.perf_counter())

    facts = {"stamps": stamps, "loss": loss.item(), "trainable": sum(p.numel() for p in net.parameters())}
    Path(job["out"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
