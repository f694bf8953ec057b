"""How good a model is, with n and an interval: probes, registered retrieval, fidelity to a teacher."""

from pathokd.evaluate.compare import ModelScores, compare_models
from pathokd.evaluate.fidelity import Fidelity, measure_fidelity
from pathokd.evaluate.images import probe_images
from pathokd.evaluate.pairs import RegisteredPair, place_ids, registered_pairs
from pathokd.evaluate.probes import ProbeResult, cross_probe, linear_probe
from pathokd.evaluate.retrieval import RetrievalScore, score_retrieval

__all__ = [
    "Fidelity",
    "ModelScores",
    "ProbeResult",
    "RegisteredPair",
    "RetrievalScore",
    "compare_models",
    "cross_probe",
    "linear_probe",
    "measure_fidelity",
    "place_ids",
    "probe_images",
    "registered_pairs",
    "score_retrieval",
]
