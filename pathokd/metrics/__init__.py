"""Pure measures of embeddings: do two models agree, and does tissue beat stain and scanner."""

from pathokd.metrics.retrieval import (
    ConditionPair,
    PairedHits,
    conditions_topk,
    knn_overlap,
    mean_topk,
    paired_hits,
    paired_topk,
)
from pathokd.metrics.similarity import cosine, linear_cka, separation, unit_rows

__all__ = [
    "ConditionPair",
    "PairedHits",
    "conditions_topk",
    "cosine",
    "knn_overlap",
    "linear_cka",
    "mean_topk",
    "paired_hits",
    "paired_topk",
    "separation",
    "unit_rows",
]
