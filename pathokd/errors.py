"""What can go wrong in the world, as opposed to in an argument (those are ValueError and TypeError).

Every message is one sentence a user can act on: what was expected, what came, what to do.
"""


class PathokdError(Exception):
    """Base of every error pathokd raises about files, slides, weights and stores."""


class SlideError(PathokdError):
    """A slide cannot be opened, has no usable mpp, or a region of it cannot be read."""


class ManifestError(PathokdError):
    """A slide list, tile manifest or packed index is missing, malformed or of another run."""


class WeightsError(PathokdError):
    """Weights are missing, gated, of another architecture, or fail their checksum."""


class StoreError(PathokdError):
    """A file cannot be written or read back: disk full, truncated, or made with other settings."""


class TrainingError(PathokdError):
    """Training cannot go on: a non-finite loss, no usable tiles, a checkpoint of another run."""
