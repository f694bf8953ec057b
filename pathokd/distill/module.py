"""The LightningModule: frozen teachers, one student or several, a list of objectives."""

import sys
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from pathokd.data.batch import TileBatch
from pathokd.data.datamodule import TileDataModule
from pathokd.data.views import CLEAN
from pathokd.distill.batch_features import TargetCache, view_images
from pathokd.distill.cached import CachedTeacher, open_teacher, student_source
from pathokd.distill.callbacks import logs_now
from pathokd.distill.denoise import load_denoisers
from pathokd.distill.network import ProjectedStudent, ProjectorSpec, head_key
from pathokd.distill.objective import Objective, Tokens
from pathokd.distill.optim import OptimSpec, Schedules, parameter_groups
from pathokd.distill.projector_start import ProjectorStart, compared, described, first_batches, solve
from pathokd.distill.prototypes import Agreement, check_head, check_views, head_sha256, load_heads, plan_temperatures
from pathokd.distill.provenance import check_shapes, check_teacher, teacher_facts
from pathokd.distill.random_state import part_streams, random_state, same_draws, set_random_state
from pathokd.distill.strategy import check_form, check_strategy, compile_student, spread
from pathokd.distill.terms import Shared
from pathokd.distill.trainee import Losses, Trainee, named_students, under
from pathokd.distill.validation import Validation
from pathokd.distill.warm_start import start_heads
from pathokd.errors import TrainingError
from pathokd.losses import AlignmentLoss, PrototypeLoss, RelationLoss
from pathokd.models.dino_head import DinoHeadSpec
from pathokd.models.prototype_head import PrototypeHead
from pathokd.models.standardize import Standardizer
from pathokd.models.student import FIRST, StudentSpec, build_student
from pathokd.models.teacher import Teacher, TeacherSpec
from pathokd.processes import gather_objects, mean_over_processes, process_rank, world_size
from pathokd.types import FloatArray

CHECKPOINT_SCHEMA = "distillation/3"
_BEST: tuple[tuple[type[nn.Module], str, Literal["min", "max"]], ...] = (
    (AlignmentLoss, "val/cosine_cls", "max"),
    (PrototypeLoss, "val/kl_cls", "min"),
    (AlignmentLoss, "val/cosine_patches", "max"),
    (PrototypeLoss, "val/kl_patches", "min"),
)


class DistillationModule(L.LightningModule):
    """Distils frozen teachers into one student, or into several that share each forward of the teachers.

    Teachers are never trained, wrapped by a strategy, or checkpointed.

    Args:
        teachers: key to teacher. The first one gives the student its normalisation and mpp unless it states its own.
        student: the student to build.
        objectives: terms of the loss.
        more_students: name to student: others that learn by the same objectives and settings from the same targets.
            Each has heads, average, balance and clipping of its own, and the run of `student` is what it would be
            without them, unless in 16-mixed, where a step that overflows for one is skipped for all. Their measures
            have their names, and so has `pathokd export --student`.
        projector: kind of the projectors from student to teacher space, and how they begin.
        dino_head: heads of the student for objectives on prototypes.
        optim: optimiser and schedules.
        standardize_steps: training steps over which each target's mean and standard deviation are estimated before
            they are frozen; 0 compares with raw targets.
        ema_momentum: of the student's moving average, first and last step; None keeps none. The average is what is
            validated and exported.
        compile: run student and teachers through `torch.compile`.
        fidelity_tiles: validation tiles used for CKA and k-NN overlap.

    Raises:
        ValueError: no teacher or objective, a number out of range, or a teacher's or student's name that is taken.
    """

    def __init__(
        self,
        teachers: dict[str, TeacherSpec],
        student: StudentSpec,
        objectives: list[Objective],
        more_students: dict[str, StudentSpec] | None = None,
        projector: ProjectorSpec = ProjectorSpec(),  # noqa: B008 (frozen)
        dino_head: DinoHeadSpec = DinoHeadSpec(),  # noqa: B008 (frozen)
        optim: OptimSpec = OptimSpec(),  # noqa: B008 (frozen)
        standardize_steps: int = 200,
        ema_momentum: tuple[float, float] | None = (0.994, 1.0),
        compile: bool = False,
        fidelity_tiles: int = 2048,
    ) -> None:
        super().__init__()
        if not teachers or not objectives:
            raise ValueError("Distillation needs at least one teacher and one objective.")
        if min(standardize_steps, fidelity_tiles) < 0:
            raise ValueError(
                f"standardize_steps and fidelity_tiles must not be negative, got {standardize_steps} and "
                f"{fidelity_tiles}."
            )
        if ema_momentum is not None and not (min(ema_momentum) >= 0 and max(ema_momentum) <= 1):
            raise ValueError(f"ema_momentum must lie in 0 to 1, first and last, got {ema_momentum}.")
        self.teacher_specs = teachers
        self.student_specs = named_students(student, more_students or {}, teachers)
        self.objectives = objectives
        self.projector_spec, self.dino_head_spec, self.optim_spec = projector, dino_head, optim
        self.standardize_steps, self.ema_momentum = standardize_steps, ema_momentum
        self.compile_models, self.fidelity_tiles = compile, fidelity_tiles
        self.students = nn.ModuleDict()
        self.schedules: Schedules | None = None
        self.steps_before: int | None = None  # of the run that a checkpoint is of
        self.training_facts: dict[str, Any] = {}
        # A Teacher keeps its encoder out of the module tree: registering it moves it along and stores nothing.
        self.teachers = nn.ModuleDict()
        self.prototypes = nn.ModuleDict()
        self.denoisers = nn.ModuleDict()
        self.denoised_by: dict[str, str] = {}
        self.begun: dict[str, list[str]] = {}  # projectors of each student that no export brought
        self.temperatures: dict[str, FloatArray] = {}
        self.crops: Collection[str] = {CLEAN}
        for objective in objectives:
            self._teacher_of(objective)

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        """Refuse what `check_strategy` refuses."""
        check_strategy(self.trainer)

    def configure_model(self) -> None:
        """Build teachers, student, projectors and statistics; Lightning may call it more than once."""
        if self.students:
            return
        self.teachers.update({key: open_teacher(spec) for key, spec in self.teacher_specs.items()})
        for objective in self.objectives:
            if isinstance(stored := self.teacher(self._teacher_of(objective)), CachedTeacher):
                stored.check(objective)
        first = self.teacher(next(iter(self.teacher_specs)))
        wanted = [(key, tokens, self.teacher(key).embed_dim) for key, tokens in self._targets()]
        teachers = {key: self.teacher(key) for key in self.teacher_specs}
        heads = load_heads([(self._teacher_of(objective), objective) for objective in self.objectives], teachers)
        self.prototypes.update(heads)
        compared = list(self._targets((AlignmentLoss, RelationLoss)))
        denoisers = load_denoisers(self.teacher_specs, teachers, compared)
        self.denoisers.update(denoisers.parts)
        self.denoised_by.update(denoisers.identity)
        counts = {key: head.count for key, head in heads.items()}
        self.statistics = nn.ModuleDict(
            {head_key(key, tokens): self._standardizer(key, tokens) for key, tokens in compared}
            if self.standardize_steps
            else {}
        )
        momentum = self.ema_momentum[0] if self.ema_momentum else None
        # Lightning makes weights where they will be trained, and so draws them from that device's stream.
        device = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
        start = random_state(device)
        layers = any(spec.init == "teacher-layers" for spec in self.student_specs.values())
        source = student_source(next(iter(self.teacher_specs.values())), first, layers=layers)
        for name, spec in self.student_specs.items():
            with nullcontext() if name == FIRST else same_draws(start, device):
                encoder = build_student(spec, source)
                net = ProjectedStudent(encoder, wanted, self.projector_spec, counts, self.dino_head_spec)
            brought = start_heads(net, spec.init, teachers, dict(self.statistics.items()), fill=name == FIRST)
            self.students[name] = Trainee(net, self.objectives, momentum)
            self.begun[name] = [head for head in net.heads if head not in brought]
            if self.compile_models:
                compile_student(encoder, self._trainer)
        if self.compile_models:
            for teacher in self.teachers.values():
                if isinstance(teacher, Teacher):
                    teacher.encoder.compile()
        for teacher in self.teachers.values():
            if isinstance(teacher, CachedTeacher):
                teacher.release()
        part_streams()
        spread(self, [net for each in self.trainees.values() for net in dict.fromkeys((each.net, each.evaluated))])

    def teacher(self, key: str) -> Teacher | CachedTeacher:
        """The frozen teacher called `key`, running or by its stored targets; there is none before `configure_model`."""
        return self.teachers[key]  # type: ignore[return-value]

    @property
    def trainees(self) -> dict[str, Trainee]:
        """The students by name, `student` first; there is none before `configure_model`."""
        if not self.students:
            raise RuntimeError("configure_model() has not run yet.")
        return dict(self.students.items())  # type: ignore[arg-type]

    @property
    def net(self) -> ProjectedStudent:
        """What is trained of `student`."""
        return self.trainees[FIRST].net

    @property
    def evaluated(self) -> ProjectedStudent:
        """What is validated and exported of `student`: its moving average if there is one."""
        return self.trainees[FIRST].evaluated

    @property
    def best_measure(self) -> tuple[str, Literal["min", "max"]]:
        """What tells the best epoch, and which way: the cosine of class tokens, or else how far assignments differ."""
        for kind, name, mode in _BEST:
            asked = {self._teacher_of(o) for o in self.objectives
                     if isinstance(o.loss, kind) and f"_{o.tokens}" in name}  # fmt: skip
            for number, key in enumerate(self.teacher_specs):
                if key in asked:
                    return (name if number == 0 else name.replace("val/", f"val/{key}/")), mode
        raise ValueError(
            "No objective compares tokens with a teacher's, which tells the best epoch: add one, such as "
            "pathokd.losses.Cosine (with detach: true it only measures), or set data.val_fraction to 0."
        )

    def _standardizer(self, key: str, tokens: Tokens) -> Standardizer:
        teacher = self.teacher(key)
        if isinstance(teacher, CachedTeacher) and head_key(key, tokens) not in self.denoisers:
            return teacher.standardizer(tokens)
        return Standardizer(teacher.embed_dim)  # also of stored targets that are denoised: they spread otherwise

    def _targets(self, kinds: tuple[type[nn.Module], ...] = (AlignmentLoss,)) -> Iterator[tuple[str, Tokens]]:
        """Distinct (teacher, tokens) of the objectives of some kinds, in order; by default those with a projector."""
        yield from dict.fromkeys(
            (self._teacher_of(objective), objective.tokens)
            for objective in self.objectives
            if isinstance(objective.loss, kinds)
        )

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
        """Sum of the objectives on one batch, of all students."""
        losses = self.losses(batch)
        means = mean_over_processes(torch.stack([losses.total, *losses.parts.values()]))
        if logs_now(self.trainer):
            self.log("train/loss", means[0], prog_bar=True)
            self.log_dict({f"train/{name}": mean for name, mean in zip(losses.parts, means[1:], strict=True)})
            for name, student in self.trainees.items():
                shared = zip(student.objectives.items(), student.weights(), strict=True)
                weights = {under(name, f"weight/{key}"): weight for (key, o), weight in shared if o.share is not None}
                self.log_dict({f"train/{key}": weight for key, weight in weights.items()})
        parts = {name: part.detach() for name, part in losses.parts.items()}
        return {"loss": losses.total, "mean": means[0], "parts": parts}

    def losses(self, batch: TileBatch) -> Losses:
        """All objectives of all students on a batch; each network sees each view once."""
        targets, crops = self._targets_of(batch), self._known_crops()
        shared = Shared(batch, targets, crops, self._teacher_of, self.prototype_head, self._temperature)
        start = random_state(self.device) if len(self.students) > 1 else {}
        each: dict[str, Losses] = {}
        for name, student in self.trainees.items():
            # Others draw what the first one drew and leave no trace, so that its run is the same with or without them.
            with nullcontext() if name == FIRST else same_draws(start, self.device):
                each[name] = student.losses(shared)
            targets.counts = False
        parts = {under(name, key): part for name, found in each.items() for key, part in found.parts.items()}
        return Losses(torch.stack([found.total for found in each.values()]).sum(), parts)

    def _targets_of(self, batch: TileBatch) -> TargetCache:
        return TargetCache(self.teachers, self.prototypes, self._standardise, batch)

    def _standardise(self, name: str, raw: Tensor, counts: bool) -> Tensor:
        """Tokens in the scale of the target `name`, whose statistics they enter in the first steps if they count."""
        if name in self.denoisers:
            raw = self.denoisers[name](raw)
        if not self.standardize_steps:
            return raw
        statistics: Standardizer = self.statistics[name]  # type: ignore[assignment]
        if counts and self.training and self.global_step < self.standardize_steps:
            statistics.update(raw)
        standardised: Tensor = statistics(raw)
        return standardised

    def prototype_head(self, key: str, tokens: Tokens) -> PrototypeHead:
        """The fixed prototypes for `tokens` of teacher `key`."""
        return self.prototypes[head_key(key, tokens)]  # type: ignore[return-value]

    def _temperature(self, name: str, loss: PrototypeLoss) -> float:
        """Of the teacher at this step; outside a run, that of its end."""
        planned = self.temperatures.get(name)
        if planned is None:
            return loss.teacher_temperature[1]
        return float(planned[min(self.global_step, len(planned) - 1)])

    def _known_crops(self) -> Collection[str]:
        """The data's crops; before a run, what the objectives' names tell."""
        named = (view for objective in self.objectives for view in (*objective.views, *objective.teacher_views))
        return {*self.crops, *(view.partition("/")[0] for view in named if "/" in view)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its schedules follow the optimiser step, so a resumed run needs no state for them."""
        groups = []
        for name, student in self.trainees.items():
            net = student.net
            own = parameter_groups(net.encoder.model, [net.heads, net.dino_heads], self.optim_spec)
            groups += [{**group, "student": name} for group in own]
        # Under mixed precision Lightning refuses to clip before a fused step.
        mixed = self._trainer is not None and str(self._trainer.precision).endswith("mixed")
        fused = not mixed and self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=self.optim_spec.lr, betas=self.optim_spec.betas, fused=fused)

    def on_train_start(self) -> None:
        """Plan the schedules.

        Not in `configure_optimizers`: asking Lightning for the number of steps there sets up the training data before
        the loader's saved position is restored, and a resumed run would start its epoch over.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The schedules need an end: set trainer.max_epochs or trainer.max_steps.")
        self.schedules = Schedules.plan(self.optim_spec, int(steps), self.ema_momentum or (0.0, 0.0))
        self.schedules.apply(self.optimizers(use_pl_optimizer=False), self.trainer.global_step)  # type: ignore[arg-type]
        self.temperatures = plan_temperatures(self.objectives, int(steps))
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TileDataModule):
            self.crops = data.views.crops
            self.training_facts["data"] = data.described()
        for objective in self.objectives:
            check_views(objective, self._known_crops())  # what cannot be paired is refused before the first step
        if self.projector_spec.solve_tiles and self.trainer.global_step == 0 and any(self.begun.values()):
            self._solve_projectors(data)

    @torch.no_grad()
    def _solve_projectors(self, data: Any) -> None:
        """Begin projectors where least squares puts them."""
        if not isinstance(data, TileDataModule):
            raise ValueError(
                "model.projector.solve_tiles needs the tiles of a TileDataModule: set it to 0 without one."
            )
        terms = compared(self.objectives, self._teacher_of, self._known_crops())
        starts = {
            name: ProjectorStart(
                student.net,
                student.evaluated,
                [term for term in terms if term.head in self.begun[name]],
                self.statistics,
            )
            for name, student in self.trainees.items()
        }
        loader, together = data.train_dataloader(), data.batch_size * world_size()
        count = min(len(loader), -(-self.projector_spec.solve_tiles // together))
        draws = same_draws(random_state(self.device), self.device)
        with draws, self.trainer.precision_plugin.forward_context():
            batches = first_batches(loader, count, say=self.trainer.is_global_zero)
            told = solve(starts, map(self.trainer.strategy.batch_to_device, batches), self._targets_of)
        if self.trainer.is_global_zero:
            print(described(told, count * together), file=sys.stderr, flush=True)  # noqa: T201

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, set the next step's learning rate and weight decay, which callbacks log before it, move the average."""
        if self.schedules is None:
            raise RuntimeError("on_train_start() has not run yet.")
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        self.schedules.apply(self.optimizers(use_pl_optimizer=False), step + 1)  # type: ignore[arg-type]
        for student in self.trainees.values():
            if student.ema is not None:
                student.ema.update(student.net, self.schedules.at("momentum", step))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each student's gradient by its own norm: one that jumps must not slow the others down."""
        if len(self.students) == 1 or (gradient_clip_val or 0) <= 0 or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for name in self.students:
            groups = [group["params"] for group in optimizer.param_groups if group["student"] == name]
            nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group], gradient_clip_val or 0)

    # -------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Start the measures afresh."""
        self._validations = {}
        for name in self.students:
            agreement = {
                (key, objective.tokens): Agreement(self.prototype_head(key, objective.tokens), objective.loss)
                for objective in self.objectives
                if isinstance(objective.loss, PrototypeLoss)
                for key in [self._teacher_of(objective)]
            }
            found = Validation(self.teacher_specs, self._targets(), agreement, self.fidelity_tiles)
            self._validations[name] = found

    def validation_step(self, batch: TileBatch, batch_idx: int) -> None:
        """Compare the evaluated students with each teacher on clean tiles."""
        targets, clean = self._targets_of(batch), view_images(batch["views"], CLEAN)
        for name, student in self.trainees.items():
            self._validations[name].add(student.evaluated, clean, targets)

    def on_validation_epoch_end(self) -> None:
        """Log the measures as `val/...`, those of the first student and teacher without their names."""
        self._log_measures("val")

    def on_test_epoch_start(self) -> None:
        """Start the measures afresh."""
        self.on_validation_epoch_start()

    def test_step(self, batch: TileBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the measures as `test/...`."""
        self._log_measures("test")

    def _log_measures(self, stage: str) -> None:
        for name, validation in self._validations.items():
            for number, measures in enumerate(validation.compute(stage if name == FIRST else f"{stage}/{name}")):
                on_device = {key: value.to(self.device) for key, value in measures.items()}
                self.log_dict(on_device, prog_bar=name == FIRST and number == 0, sync_dist=True)
        del self._validations  # their features are not kept through the next epoch

    # ------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what export needs to know, and the random state that an exact resume needs."""
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items() if "/" in name}
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["pathokd"] = {
            "schema": CHECKPOINT_SCHEMA,
            "students": {
                name: {"spec": asdict(self.student_specs[name]), "card": asdict(student.evaluated.encoder.card)}
                for name, student in self.trainees.items()
            },
            "projector": asdict(self.projector_spec),
            "targets": [[key, tokens, self.teacher(key).embed_dim] for key, tokens in self._targets()],
            "teachers": {
                key: teacher_facts(self.teacher_specs[key], self.teacher(key), self.denoised_by.get(key))
                for key in self.teachers
            },
            "prototypes": self._prototype_hashes(),
            "ema": self.ema_momentum is not None,
            "metrics": logged,
            "facts": self.training_facts,
            "split": data.split() if isinstance(data, TileDataModule) else None,
            "processes": world_size(),
            "steps": 0 if self.schedules is None else len(self.schedules.lr),
            "random": gather_objects(random_state(self.device)),
        }

    def _prototype_hashes(self) -> dict[str, str]:
        return {name: head_sha256(head) for name, head in self.prototypes.items()}  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another teacher or number of processes; restore the random state."""
        saved = checkpoint.get("pathokd")
        if saved is None or saved.get("schema") != CHECKPOINT_SCHEMA:
            raise TrainingError(f"This checkpoint is none of pathokd's: expected schema {CHECKPOINT_SCHEMA!r} in it.")
        if list(saved["students"]) != list(self.student_specs):
            raise TrainingError(
                f"This checkpoint holds the students {', '.join(saved['students'])}, and this run has "
                f"{', '.join(self.student_specs)}: go on with the same model.more_students."
            )
        training = self._trainer is None or self._trainer.state.fn == "fit"
        for key, facts in saved["teachers"].items():
            if key not in self.teacher_specs:
                continue
            spec, denoise = self.teacher_specs[key], self.denoised_by.get(key)
            check_teacher(key, spec, self.teacher(key), denoise, facts, training=training)
        for name, sha256 in saved.get("prototypes", {}).items():
            if name in self.prototypes:
                check_head(name, self.prototypes[name], sha256)  # type: ignore[arg-type]
        if "state_dict" in checkpoint:  # of one in shards the strategy has compared and read the weights
            check_shapes(self.state_dict(), {name: value.shape for name, value in checkpoint["state_dict"].items()})
        if self._trainer is None:
            return
        if self._trainer.state.fn != "fit":
            data = getattr(self._trainer, "datamodule", None)
            if isinstance(data, TileDataModule) and (split := saved.get("split")):  # early checkpoints do not say
                data.check_held_out(split)
            return
        processes = saved.get("processes", 1)
        if processes != world_size():
            raise TrainingError(
                f"This checkpoint was written by a training of {processes} process(es), and this is one of "
                f"{world_size()}: each has random numbers of its own, so the run would become another one; resume with "
                f"trainer.devices x trainer.num_nodes = {processes}."
            )
        check_form(self._trainer, checkpoint)
        self.steps_before = saved.get("steps")
        set_random_state(saved["random"][process_rank()], self.device)
