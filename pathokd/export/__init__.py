"""A trained student as a folder: written, verified, read back."""

from pathokd.export.checkpoint import export_student, load_adaptors, load_line
from pathokd.export.run import export_run

__all__ = ["export_run", "export_student", "load_adaptors", "load_line"]
