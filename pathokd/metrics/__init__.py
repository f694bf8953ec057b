"""Pure measures of embeddings: do two models agree, and does tissue beat stain and scanner.

Measures that need scikit-learn are imported from their own modules: `clustering`, `confounding`.
"""

from pathokd.metrics.aggregate import Condition, leaderboard_number, summarise_pairs
from pathokd.metrics.conditions import compare_conditions, paired_memory
from pathokd.metrics.neighbours import typed_neighbours
from pathokd.metrics.retrieval import (
    ConditionPair,
    PairedHits,
    conditions_topk,
    knn_overlap,
    mean_topk,
    paired_hits,
    paired_topk,
)
from pathokd.metrics.robustness import robustness_index, robustness_margins
from pathokd.metrics.similarity import cosine, linear_cka, separation, unit_rows

__all__ = [
    "Condition",
    "ConditionPair",
    "PairedHits",
    "compare_conditions",
    "conditions_topk",
    "cosine",
    "knn_overlap",
    "leaderboard_number",
    "linear_cka",
    "mean_topk",
    "paired_hits",
    "paired_memory",
    "paired_topk",
    "robustness_index",
    "robustness_margins",
    "separation",
    "summarise_pairs",
    "typed_neighbours",
    "unit_rows",
]
