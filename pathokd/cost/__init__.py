"""What a model costs to run."""

from pathokd.cost.profile import ModelCost, count_gflops, count_params, measure_tiles_per_s, profile_model

__all__ = ["ModelCost", "count_gflops", "count_params", "measure_tiles_per_s", "profile_model"]
