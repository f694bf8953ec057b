"""A teacher that said everything beforehand: stored targets where a running teacher would stand."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pathokd.data.targets import TargetStore
from pathokd.data.views import CLEAN
from pathokd.distill.objective import Objective, Tokens
from pathokd.errors import StoreError
from pathokd.losses import PrototypeLoss
from pathokd.models.cards import ModelCard
from pathokd.models.codec import FP16_ROUNDING, TokenCodec
from pathokd.models.features import Features
from pathokd.models.standardize import Standardizer
from pathokd.models.teacher import Teacher, TeacherSpec, build_teacher
from pathokd.models.vit import Encoder

_WHO = ("architecture", "model_args", "image_px", "mean", "std")


class CachedTeacher(nn.Module):
    """Decodes stored targets on the device of the training; no weights, no gradients, nothing in a checkpoint.

    Args:
        store: the targets.
        encoder: the model that they are of, where a student takes its first weights from it; see `release`.
    """

    encoder: Encoder | None
    codecs: dict[str, TokenCodec]

    def __init__(self, store: TargetStore, encoder: Encoder | None = None) -> None:
        super().__init__()
        facts, settings = store.header["facts"], store.settings
        colour = {name: tuple(facts["card"][name]) for name in ("mean", "std")}
        self.store = store
        self.card = ModelCard(**{**facts["card"], **colour})
        self.embed_dim = store.embed_dim
        self.weights_sha256: str = settings["weights_sha256"]
        self._stored = {name: torch.from_numpy(value) for name, value in store.codec().items()}
        # Beside the module tree, as a running teacher's encoder: moved along, never in a state_dict.
        self.__dict__["encoder"] = encoder
        self.__dict__["codecs"] = {
            kind: TokenCodec(
                settings["dtype"],
                **{name: self._stored[f"{kind}.{name}"] for name in ("mean", "std", "rotation")
                   if f"{kind}.{name}" in self._stored},
            )
            for kind in (("cls",) if store.grid is None else ("cls", "patches"))
        }  # fmt: skip

    @property
    def weights_sha256_bf16(self) -> str | None:
        """The same of the weights in bf16; None where early targets, of a teacher in fp32, do not say."""
        in_bf16 = self.store.settings["precision"] == "bf16"
        return self.weights_sha256 if in_bf16 else self.store.header["facts"].get("weights_sha256_bf16")

    @property
    def identity(self) -> str:
        """Fingerprint of the targets, for checkpoints."""
        return self.store.identity

    @property
    def pooled_grid(self) -> tuple[int, int] | None:
        """The grid that patch tokens were averaged on; None if they are stored one by one."""
        return self.store.grid if self.store.pooled else None

    def release(self) -> None:
        """Let go of the weights, once the student is built."""
        self.__dict__["encoder"] = None

    def forward(self, stored: Mapping[str, Tensor]) -> Features:
        """What the teacher said of a batch.

        Args:
            stored: arrays of `TargetStore.read`, stacked.

        Returns:
            fp32 features; no patches at all if only class tokens were stored.
        """
        with torch.no_grad():
            cls = self.codecs["cls"].decode(stored["cls"], stored.get("cls_scale"))
            if self.store.grid is None:
                return Features(cls=cls, patches=cls.new_empty(len(cls), 0, self.embed_dim), grid=(0, 0))
            patches = self.codecs["patches"].decode(stored["patches"], stored.get("patches_scale"))
        return Features(cls=cls, patches=patches, grid=self.store.grid)

    def standardizer(self, tokens: Tokens) -> Standardizer:
        """Standardisation by the statistics of all stored targets."""
        mean, std = self._stored[f"{tokens}.target_mean"], self._stored[f"{tokens}.target_std"]
        if self.codecs[tokens].dtype == "fp16" and self.codecs[tokens].mean is None:
            # What fp16 rounds off a dimension that hardly varies would outweigh all others, over its deviation.
            std = torch.where(std > 0, std.maximum(mean.abs() * FP16_ROUNDING), std)
        # A dimension that never varies has nothing to be divided by; what is left of it is 0.
        return Standardizer(self.embed_dim, mean=mean, std=torch.where(std > 0, std, torch.ones_like(std)))

    def check(self, objective: Objective) -> None:
        """Refuse an objective that asks for what was not stored.

        Raises:
            StoreError: another view than the clean one, or patch tokens where there are none.
        """
        if not objective.asks_teacher:
            return
        other = next((view for view in objective.teacher_views if view != CLEAN), None)
        if other is not None:
            raise StoreError(
                f"Objective {objective.name} takes the teacher's view {other!r}, and the targets in "
                f"{self.store.folder} are of the view {CLEAN!r}: set teacher_view to {CLEAN}, or leave out the targets "
                "and run the teacher."
            )
        if objective.tokens == "patches" and self.store.grid is None:
            raise StoreError(
                f"Objective {objective.name} takes patch tokens, and {self.store.folder} holds class tokens only: run "
                "`pathokd cache` with --tokens patches, pooled or cls+mean, or leave this objective out."
            )
        if objective.tokens == "patches" and self.pooled_grid and isinstance(objective.loss, PrototypeLoss):
            raise StoreError(
                f"Objective {objective.name} assigns single patch tokens to prototypes, and {self.store.folder} holds "
                "averages of them: run `pathokd cache` with --tokens patches, or take the prototypes of cls tokens."
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CachedTeacher":
        """Carry the codecs along to another device; a change of dtype is ignored."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        for codec in self.codecs.values():
            codec._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def open_teacher(spec: TeacherSpec) -> Teacher | CachedTeacher:
    """The teacher that `spec` names: running, or by its stored targets.

    Weights that are named beside targets are loaded once to see that the targets are theirs.

    Raises:
        StoreError: targets missing, unfinished, or of another teacher.
        WeightsError: weights that cannot be loaded.
    """
    if spec.targets is None:
        return build_teacher(spec)
    store = TargetStore(spec.targets)
    return CachedTeacher(store, _checked_encoder(spec, store) if spec.weights else None)


def _checked_encoder(spec: TeacherSpec, store: TargetStore) -> Encoder:
    teacher = build_teacher(replace(spec, targets=None, precision=store.settings["precision"]))
    card = teacher.card
    found = {name: getattr(card, name) for name in _WHO} | {"weights_sha256": teacher.weights_sha256}
    for name, value in found.items():
        have = store.settings[name]
        if have != (list(value) if isinstance(value, tuple) else value):
            raise StoreError(
                f"The targets in {store.folder} are of another teacher than {spec.weights}: {name} is {have!r} there "
                f"and {value!r} here. Run `pathokd cache {spec.weights}`, or name the teacher they were made with."
            )
    return teacher.encoder


def student_source(spec: TeacherSpec, teacher: Teacher | CachedTeacher, *, layers: bool) -> Encoder | ModelCard:
    """What a student is built from: the first teacher, with its weights as in their file if layers are taken from it.

    A teacher that runs in bf16 holds rounded ones, each off by up to 2^-9 of itself: these are read once more.

    Args:
        spec: of the teacher.
        teacher: as it runs.
        layers: whether a student takes blocks.
    """
    encoder = teacher.encoder
    if encoder is None:
        return teacher.card
    if not layers or not spec.pretrained or encoder.dtype == torch.float32:
        return encoder
    with torch.random.fork_rng(devices=[]):  # the students' own draws stay what they were
        return build_teacher(replace(spec, targets=None, precision="fp32")).encoder
