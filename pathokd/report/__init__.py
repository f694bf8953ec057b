"""Scores as tables for people and as JSON for programs."""

from pathokd.report.summary import comparison_summary, write_summary
from pathokd.report.tables import comparison_markdown, comparison_table, fidelity_sentence

__all__ = [
    "comparison_markdown",
    "comparison_summary",
    "comparison_table",
    "fidelity_sentence",
    "write_summary",
]
