"""Procedural H&E with ground truth: tissue, staining, scanner, slide file."""

from pathokd.phantom.cohort import CohortSpec, case_seed, write_cohort
from pathokd.phantom.layout import CLASSES
from pathokd.phantom.pyramid import write_pyramid
from pathokd.phantom.scanner import SCANNERS, Scanner, render
from pathokd.phantom.scene import Scene, make_scene
from pathokd.phantom.stain import STAININGS, Staining

__all__ = [
    "CLASSES",
    "SCANNERS",
    "STAININGS",
    "CohortSpec",
    "Scanner",
    "Scene",
    "Staining",
    "case_seed",
    "make_scene",
    "render",
    "write_cohort",
    "write_pyramid",
]
