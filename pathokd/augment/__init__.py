"""Stain and scanner variation: pure functions, and albumentations transforms over them."""

from pathokd.augment.factors import FACTORS, ScannerJitter
from pathokd.augment.fit import fit_scanner_profile
from pathokd.augment.presets import StudentView, dino_views, distillation_views
from pathokd.augment.scanner import PROFILES, ScannerProfile, ScannerSwap, get_profile
from pathokd.augment.stain import HEDJitter, RandStainNA, StainJitter, StainSwap, swap_stain
from pathokd.augment.stain_basis import macenko_basis, measure_appearance, vahadane_basis
from pathokd.augment.stain_math import Appearance
from pathokd.augment.stainings import STAININGS, get_staining
from pathokd.augment.statistics import StainStatistics, fit_statistics

__all__ = [
    "FACTORS",
    "PROFILES",
    "STAININGS",
    "Appearance",
    "HEDJitter",
    "RandStainNA",
    "ScannerJitter",
    "ScannerProfile",
    "ScannerSwap",
    "StainJitter",
    "StainStatistics",
    "StainSwap",
    "StudentView",
    "dino_views",
    "distillation_views",
    "fit_scanner_profile",
    "fit_statistics",
    "get_profile",
    "get_staining",
    "macenko_basis",
    "measure_appearance",
    "swap_stain",
    "vahadane_basis",
]
