"""Networks: cards, encoders, teachers, students, projectors, target statistics, averaging."""

from pathokd.models.cards import ModelCard
from pathokd.models.ema import Ema
from pathokd.models.encoder import load_encoder
from pathokd.models.features import READOUTS, Features, Readout, pool_patches, readout, readout_dim, resize_patches
from pathokd.models.outside import VectorEncoder
from pathokd.models.plugins import open_model
from pathokd.models.projector import Projector, ProjectorKind, make_projector
from pathokd.models.standardize import Standardizer
from pathokd.models.student import StudentSpec, build_student
from pathokd.models.teacher import Teacher, TeacherSpec, build_teacher
from pathokd.models.vit import Encoder
from pathokd.models.zoo import card_names, get_card

__all__ = [
    "READOUTS",
    "Ema",
    "Encoder",
    "Features",
    "ModelCard",
    "Projector",
    "ProjectorKind",
    "Readout",
    "Standardizer",
    "StudentSpec",
    "Teacher",
    "TeacherSpec",
    "VectorEncoder",
    "build_student",
    "build_teacher",
    "card_names",
    "get_card",
    "load_encoder",
    "make_projector",
    "open_model",
    "pool_patches",
    "readout",
    "readout_dim",
    "resize_patches",
]
