"""The LightningModule: frozen teachers, one student, a list of objectives."""

from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.data.batch import TileBatch
from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import CLEAN, crop_of
from pathokd.distill.cached import CachedTeacher, open_teacher
from pathokd.distill.fidelity import Fidelity
from pathokd.distill.network import ProjectedStudent, ProjectorSpec, head_key
from pathokd.distill.objective import Objective, Tokens
from pathokd.distill.optim import OptimSpec, Schedules, parameter_groups
from pathokd.errors import TrainingError
from pathokd.models.ema import Ema
from pathokd.models.features import Features, pool_patches, resize_patches
from pathokd.models.standardize import Standardizer
from pathokd.models.student import StudentSpec, build_student
from pathokd.models.teacher import Teacher, TeacherSpec

CHECKPOINT_SCHEMA = "distillation/1"


class Losses(NamedTuple):
    """The weighted sum and its unweighted parts by name, all scalars."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]


class DistillationModule(L.LightningModule):
    """Distils frozen teachers into one student.

    Teachers are never trained, wrapped by a strategy, or checkpointed.

    Args:
        teachers: key to teacher. The first one gives the student its normalisation and mpp unless it states its own.
        student: the student to build.
        objectives: terms of the loss.
        projector: kind of the projectors from student to teacher space.
        optim: optimiser and schedules.
        standardize_steps: training steps over which each target's mean and standard deviation are estimated before
            they are frozen; 0 compares with raw targets.
        ema_momentum: of the student's moving average, first and last step; None keeps none. The average is what is
            validated and exported.
        compile: run student and teachers through `torch.compile`.
        fidelity_tiles: validation tiles used for CKA and k-NN overlap.
    """

    def __init__(
        self,
        teachers: dict[str, TeacherSpec],
        student: StudentSpec,
        objectives: list[Objective],
        projector: ProjectorSpec = ProjectorSpec(),  # noqa: B008 (frozen)
        optim: OptimSpec = OptimSpec(),  # noqa: B008 (frozen)
        standardize_steps: int = 200,
        ema_momentum: tuple[float, float] | None = (0.994, 1.0),
        compile: bool = False,
        fidelity_tiles: int = 2048,
    ) -> None:
        super().__init__()
        if not teachers or not objectives:
            raise ValueError("Distillation needs at least one teacher and one objective.")
        self.teacher_specs, self.student_spec = teachers, student
        self.objectives = objectives
        self.projector_spec, self.optim_spec = projector, optim
        self.standardize_steps, self.ema_momentum = standardize_steps, ema_momentum
        self.compile_models, self.fidelity_tiles = compile, fidelity_tiles
        self.net: ProjectedStudent | None = None
        self.ema: Ema | None = None
        self.schedules: Schedules | None = None
        self.training_facts: dict[str, Any] = {}
        # A Teacher keeps its encoder out of the module tree: registering it moves it along and stores nothing.
        self.teachers = nn.ModuleDict()
        self._fidelity: dict[str, Fidelity] = {}
        for objective in objectives:
            self._teacher_of(objective)

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Build teachers, student, projectors and statistics; Lightning may call it more than once."""
        if self.net is not None:
            return
        self.teachers.update({key: open_teacher(spec) for key, spec in self.teacher_specs.items()})
        for objective in self.objectives:
            if isinstance(stored := self.teacher(self._teacher_of(objective)), CachedTeacher):
                stored.check(objective)
        first = self.teacher(next(iter(self.teacher_specs)))
        encoder = build_student(self.student_spec, first.encoder or first.card)
        wanted = [(key, tokens, self.teacher(key).embed_dim) for key, tokens in self._targets()]
        self.net = ProjectedStudent(encoder, wanted, self.projector_spec)
        self.statistics = nn.ModuleDict(
            {head_key(key, tokens): self._standardizer(key, tokens) for key, tokens, _ in wanted}
            if self.standardize_steps
            else {}
        )
        self.ema = Ema(self.net, self.ema_momentum[0]) if self.ema_momentum else None
        if self.compile_models:
            running = (teacher.encoder for teacher in self.teachers.values() if isinstance(teacher, Teacher))
            for module in (encoder, *running):
                module.compile()
        for teacher in self.teachers.values():
            if isinstance(teacher, CachedTeacher):
                teacher.release()

    def teacher(self, key: str) -> Teacher | CachedTeacher:
        """The frozen teacher called `key`, running or by its stored targets; there is none before `configure_model`."""
        return self.teachers[key]  # type: ignore[return-value]

    @property
    def evaluated(self) -> ProjectedStudent:
        """The student that is validated and exported: its moving average if there is one."""
        if self.net is None:
            raise RuntimeError("configure_model() has not run yet.")
        averaged = self.net if self.ema is None else self.ema.model
        return averaged  # type: ignore[return-value]

    def _standardizer(self, key: str, tokens: Tokens) -> Standardizer:
        teacher = self.teacher(key)
        return teacher.standardizer(tokens) if isinstance(teacher, CachedTeacher) else Standardizer(teacher.embed_dim)

    def _project(self, net: ProjectedStudent, student: Features, key: str, tokens: Tokens) -> Tensor:
        """The student's tokens in the teacher's space; on the teacher's grid where that is of averaged patches."""
        projected, teacher = net.project(student, key, tokens), self.teacher(key)
        grid = teacher.pooled_grid if tokens == "patches" and isinstance(teacher, CachedTeacher) else None
        return projected if grid is None else pool_patches(projected, student.grid, grid)

    def _targets(self) -> Iterator[tuple[str, Tokens]]:
        """Distinct (teacher, tokens) of the objectives, in order."""
        yield from dict.fromkeys((self._teacher_of(objective), objective.tokens) for objective in self.objectives)

    def _teacher_of(self, objective: Objective) -> str:
        if objective.teacher is None:
            if len(self.teacher_specs) > 1:
                raise ValueError(
                    f"Objective {objective.name} must name one of the teachers {list(self.teacher_specs)}."
                )
            return next(iter(self.teacher_specs))
        if objective.teacher not in self.teacher_specs:
            raise ValueError(f"Objective teacher {objective.teacher!r} is none of {list(self.teacher_specs)}.")
        return objective.teacher

    # ---------------------------------------------------------------- training

    def training_step(self, batch: TileBatch, batch_idx: int) -> dict[str, Any]:
        """Sum of the objectives on one batch."""
        losses = self.losses(batch)
        self.log("train/loss", losses.total.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": part.detach() for name, part in losses.parts.items()})
        return {"loss": losses.total, "parts": {name: part.detach() for name, part in losses.parts.items()}}

    def losses(self, batch: TileBatch) -> Losses:
        """All objectives on a batch; each network sees each view once."""
        if self.net is None:
            raise RuntimeError("configure_model() has not run yet.")
        views = batch["views"]
        seen: dict[str, Features] = {}
        targets = _TargetCache(self, batch)
        parts: dict[str, Tensor] = {}
        total = next(self.net.parameters()).new_zeros(())
        for objective in self.objectives:
            if objective.view not in seen:
                seen[objective.view] = self.net(_view(views, objective.view))
            student, key = seen[objective.view], self._teacher_of(objective)
            target = targets.get(key, objective.tokens, objective.teacher_view, student.grid)
            # Several crops of a tile are matched with the teacher's one view of it.
            target = target.repeat_interleave(len(student.cls) // len(target), dim=0)
            part = objective.loss(self._project(self.net, student, key, objective.tokens), target)
            parts[objective.name] = part
            total = total + objective.weight * part
        return Losses(total, parts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its schedules follow the optimiser step, so a resumed run needs no state for them."""
        if self.net is None:
            raise RuntimeError("configure_model() has not run yet.")
        groups = parameter_groups(self.net.encoder.model, [self.net.heads], self.optim_spec)
        return torch.optim.AdamW(groups, lr=self.optim_spec.lr, betas=self.optim_spec.betas)

    def on_train_start(self) -> None:
        """Plan the schedules.

        Not in `configure_optimizers`: asking Lightning for the number of steps there sets up the training data before
        the loader's saved position is restored, and a resumed run would start its epoch over.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The schedules need an end: set trainer.max_epochs or trainer.max_steps.")
        self.schedules = Schedules.plan(self.optim_spec, int(steps), self.ema_momentum or (0.0, 0.0))
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TileDataModule):
            self._check_crops(data.views.crops)
            self.training_facts["data"] = data.described()

    def _check_crops(self, crops: Collection[str]) -> None:
        """Patch tokens have partners only within one crop."""
        for objective in self.objectives:
            mine, theirs = crop_of(objective.view, crops), crop_of(objective.teacher_view, crops)
            if objective.tokens == "patches" and mine != theirs:
                raise ValueError(
                    f"Objective {objective.name} matches patches of the crop {mine!r} with those of {theirs!r}, which "
                    "shows other tissue: give view and teacher_view one crop, or match cls tokens."
                )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step with this step's learning rate and weight decay, then move the average."""
        if self.schedules is None or self.net is None:
            raise RuntimeError("on_train_start() has not run yet.")
        step = self.trainer.global_step
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.schedules.apply(optimizer, step)  # type: ignore[arg-type]
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.net, self.schedules.at("momentum", step))

    # -------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Start the measures afresh."""
        self._fidelity = {key: Fidelity(self.fidelity_tiles) for key in self.teacher_specs}

    def validation_step(self, batch: TileBatch, batch_idx: int) -> None:
        """Compare the evaluated student with each teacher on clean tiles."""
        student: Features = self.evaluated(_view(batch["views"], CLEAN))
        targets = _TargetCache(self, batch)
        for key, tokens in self._targets():
            target = targets.get(key, tokens, CLEAN, student.grid)
            prediction = self._project(self.evaluated, student, key, tokens)
            self._fidelity[key].add_cosine(f"cosine_{tokens}", prediction, target)
        for key, fidelity in self._fidelity.items():
            fidelity.add_features(student.cls, targets.features(key, CLEAN).cls)

    def on_validation_epoch_end(self) -> None:
        """Log the measures as `val/...`, the first teacher's without its name."""
        self._log_fidelity("val")

    def on_test_epoch_start(self) -> None:
        """Start the measures afresh."""
        self.on_validation_epoch_start()

    def test_step(self, batch: TileBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the measures as `test/...`."""
        self._log_fidelity("test")

    def _log_fidelity(self, stage: str) -> None:
        for number, (key, fidelity) in enumerate(self._fidelity.items()):
            prefix = stage if number == 0 else f"{stage}/{key}"
            values = {f"{prefix}/{name}": value for name, value in fidelity.compute().items()}
            self.log_dict(values, prog_bar=number == 0, sync_dist=True)

    # ------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what export needs to know, and the random state that an exact resume needs."""
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items() if "/" in name}
        checkpoint["pathokd"] = {
            "schema": CHECKPOINT_SCHEMA,
            "student": asdict(self.student_spec),
            "student_card": asdict(self.evaluated.encoder.card),
            "projector": asdict(self.projector_spec),
            "targets": [[key, tokens, self.teacher(key).embed_dim] for key, tokens in self._targets()],
            "teachers": {key: self._teacher_facts(key) for key in self.teachers},
            "ema": self.ema is not None,
            "metrics": logged,
            "facts": self.training_facts,
            "torch_rng": torch.get_rng_state(),
        }

    def _teacher_facts(self, key: str) -> dict[str, Any]:
        teacher = self.teacher(key)
        return {
            "weights": self.teacher_specs[key].weights,
            "weights_sha256": teacher.weights_sha256,
            "card": asdict(teacher.card),
            "targets": teacher.identity if isinstance(teacher, CachedTeacher) else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another teacher; restore the random state."""
        saved = checkpoint.get("pathokd")
        if saved is None or saved.get("schema") != CHECKPOINT_SCHEMA:
            raise TrainingError(f"This checkpoint is none of pathokd's: expected schema {CHECKPOINT_SCHEMA!r} in it.")
        for key, facts in saved["teachers"].items():
            if key not in self.teacher_specs:
                continue
            self._check_same_targets(key, facts.get("targets"))
            if facts["weights_sha256"] != self.teacher(key).weights_sha256:
                raise TrainingError(
                    f"Teacher {key!r} has other weights than when this checkpoint was written "
                    f"({self.teacher_specs[key].weights}): resume with the same teacher."
                )
        torch.set_rng_state(saved["torch_rng"].cpu())

    def _check_same_targets(self, key: str, saved: str | None) -> None:
        """A run goes on with the targets it began with; a finished student may be measured against either."""
        teacher = self.teacher(key)
        now = teacher.identity if isinstance(teacher, CachedTeacher) else None
        if saved != now and (self._trainer is None or self._trainer.state.fn == "fit"):
            names = ["a running teacher" if name is None else f"the stored targets {name}" for name in (saved, now)]
            raise TrainingError(
                f"Teacher {key!r} was {names[0]} when this checkpoint was written and is {names[1]} now: resume with "
                "the same model.teachers."
            )


class _TargetCache:
    """Teacher features of one batch, each view run (or read) once, standardised once."""

    def __init__(self, module: DistillationModule, batch: TileBatch) -> None:
        self._module, self._views, self._stored = module, batch["views"], batch.get("targets", {})
        self._features: dict[tuple[str, str], Features] = {}
        self._tokens: dict[tuple[str, str, str], Tensor] = {}

    def features(self, key: str, view: str) -> Features:
        """Raw features of teacher `key` on `view`."""
        if (key, view) not in self._features:
            teacher = self._module.teacher(key)
            if isinstance(teacher, CachedTeacher):
                if key not in self._stored:
                    raise ValueError(
                        f"The batch brings no targets of teacher {key!r}: give the TileDataModule the same folder, "
                        f"targets={{{key!r}: {str(teacher.store.folder)!r}}}."
                    )
                self._features[key, view] = teacher(self._stored[key])
            else:
                self._features[key, view] = teacher(_view(self._views, view))
        return self._features[key, view]

    def get(self, key: str, tokens: Tokens, view: str, grid: tuple[int, int]) -> Tensor:
        """Standardised tokens of teacher `key` on `view`, patches on the student's `grid`."""
        if (key, tokens, view) not in self._tokens:
            features, teacher = self.features(key, view), self._module.teacher(key)
            if isinstance(teacher, CachedTeacher):
                grid = teacher.pooled_grid or grid
            raw = features.cls if tokens == "cls" else resize_patches(features.patches, features.grid, grid)
            self._tokens[key, tokens, view] = self._standardise(head_key(key, tokens), raw)
        return self._tokens[key, tokens, view]

    def _standardise(self, name: str, raw: Tensor) -> Tensor:
        module = self._module
        if not module.standardize_steps:
            return raw
        statistics: Standardizer = module.statistics[name]  # type: ignore[assignment]
        if module.training and module.global_step < module.standardize_steps:
            statistics.update(raw)
        standardised: Tensor = statistics(raw)
        return standardised


def _view(views: dict[str, Tensor], name: str) -> Tensor:
    """The images of a view, (batch, 3, height, width); several crops of a tile follow each other."""
    if name not in views:
        raise ValueError(f"The batch has the views {', '.join(views)} but an objective asks for {name!r}: add it to "
                         "data.photometric, or correct the objective.")  # fmt: skip
    images = views[name]
    return images.flatten(0, 1) if images.ndim == 5 else images
