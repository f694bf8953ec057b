"""Scanner profiles: everything that takes an image of one scanner to another, named, stored, and drawn at random."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import yaml

from pathokd.augment import optics_math as optics
from pathokd.augment.ranges import checked_severity, finite, ordered_range
from pathokd.augment.stain_math import affine_od
from pathokd.errors import StoreError
from pathokd.files import make_header, read_yaml, write_text
from pathokd.types import Rgb

SCHEMA = "scanner-profile/1"
Row = tuple[float, float, float]


@dataclass(frozen=True)
class ScannerProfile:
    """Everything that takes an image of one scanner to another.

    Args:
        name: for tables and commands.
        source: where the numbers come from.
        od_matrix: map of optical density (natural logarithm), rows for red, green and blue.
        od_offset: density added; that of the glass, for one.
        blur_px: standard deviation of Gaussian blur.
        sharpen: amount of an unsharp mask of 1 px.
        shot: noise at full light, see `optics_math.sensor_noise`.
        read: noise everywhere.
        chromatic_px: shift of red in x and y; blue goes the other way.
        jpeg_quality: of the slide file; None stores without loss.
    """

    name: str
    source: str = ""
    od_matrix: tuple[Row, Row, Row] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    od_offset: Row = (0.0, 0.0, 0.0)
    blur_px: float = 0.0
    sharpen: float = 0.0
    shot: float = 0.0
    read: float = 0.0
    chromatic_px: tuple[float, float] = (0.0, 0.0)
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if np.shape(self.od_matrix) != (3, 3) or np.shape(self.od_offset) != (3,):
            raise ValueError("od_matrix must be three rows of three numbers and od_offset three numbers.")
        if np.shape(self.chromatic_px) != (2,):
            raise ValueError(f"chromatic_px must be two numbers, got {self.chromatic_px}.")
        for field in ("od_matrix", "od_offset", "chromatic_px", "blur_px", "sharpen", "shot", "read"):
            if not finite(getattr(self, field)):
                raise ValueError(f"{field} must hold finite numbers, got {getattr(self, field)}.")
        for field in ("blur_px", "sharpen", "shot", "read"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}.")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must lie in 1 to 100, or be null, got {self.jpeg_quality}.")

    def apply(self, rgb: Rgb, *, severity: float = 1.0, seed: int = 0) -> Rgb:
        """Take an image part of the way to this scanner.

        Args:
            rgb: uint8 (height, width, 3).
            severity: 0 (the image itself) to 1 (the whole profile).
            seed: of the noise.

        Returns:
            A new image.
        """
        image, s = optics.check_rgb(rgb), checked_severity(severity)
        if s == 0:
            return image.copy()
        matrix = np.eye(3) + s * (np.array(self.od_matrix) - np.eye(3))
        image = affine_od(image, matrix, s * np.array(self.od_offset), keep_glass=False)
        image = optics.gaussian_blur(image, s * self.blur_px)
        image = optics.chromatic_shift(image, *(s * shift for shift in self.chromatic_px))
        image = optics.unsharp_mask(image, s * self.sharpen)
        image = optics.sensor_noise(image, s * self.shot, s * self.read, np.random.default_rng(seed))
        quality = None if self.jpeg_quality is None else optics.jpeg_quality_at(self.jpeg_quality, s)
        return optics.jpeg(image, quality)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for YAML."""
        rows = {"od_matrix": [list(row) for row in self.od_matrix], "od_offset": list(self.od_offset)}
        return {**asdict(self), **rows, "chromatic_px": list(self.chromatic_px)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ScannerProfile":
        """What `to_dict` gave, back; what is left out has no effect.

        Raises:
            TypeError: the name is left out, a field is unknown, or of another kind.
            ValueError: a number out of range.
        """
        unknown = [key for key in values if key not in {field.name for field in fields(cls)}]
        if unknown or "name" not in values:
            trouble = f"there is no field {unknown[0]!r}" if unknown else "its name is missing"
            raise TypeError(f"{trouble}; fields are {', '.join(field.name for field in fields(cls))}.")
        plain = dict(values)
        for key in {"od_offset", "chromatic_px"} & plain.keys():
            plain[key] = tuple(plain[key])
        if "od_matrix" in plain:
            plain["od_matrix"] = tuple(tuple(row) for row in plain["od_matrix"])
        return cls(**plain)

    def save(self, path: str | Path) -> None:
        """Write as YAML."""
        write_text(path, yaml.safe_dump({**make_header(SCHEMA, {}), "profile": self.to_dict()}, sort_keys=False))

    @classmethod
    def load(cls, path: str | Path) -> "ScannerProfile":
        """Read what `save` wrote.

        Raises:
            StoreError: there is no such file, it is of another kind, or a field is missing, unknown or out of range.
        """
        found = read_yaml(path, SCHEMA, "profile", "fit it again and write it with ScannerProfile.save")
        try:
            return cls.from_dict(found)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{path} describes no scanner profile: {error} Correct it, or fit it again.") from error


def _invented(
    name: str, *, gain: float = 1.0, saturation: float = 1.0, warmth: float = 0.0, **rest: Any
) -> ScannerProfile:
    """A profile from how strong and colourful densities come out, and how much more blue than red the glass takes."""
    matrix = gain * (saturation * np.eye(3) + (1 - saturation) / 3)
    rows = [tuple(float(value) for value in row) for row in matrix]
    return ScannerProfile(
        name,
        "invented, within the range of models on the market",
        (rows[0], rows[1], rows[2]),  # type: ignore[arg-type]
        (-warmth / 2 + 0.02, 0.02, warmth + 0.02),
        **rest,
    )


PROFILES: dict[str, ScannerProfile] = {
    profile.name: profile
    for profile in (
        _invented("soft-warm", gain=0.92, saturation=0.85, warmth=0.04, blur_px=0.8, read=0.8, jpeg_quality=70),
        _invented("sharp-blue", gain=1.06, saturation=1.15, warmth=-0.03, sharpen=0.9, shot=2.0, jpeg_quality=80),
        _invented("pale", gain=0.72, saturation=1.0, blur_px=0.4, shot=1.5, jpeg_quality=85),
        _invented("contrasty", gain=1.3, saturation=1.05, sharpen=0.5, jpeg_quality=75),
        _invented("grey-noisy", saturation=0.65, warmth=0.02, shot=4.0, read=2.0, jpeg_quality=60),
        _invented("fringed", warmth=0.02, blur_px=0.5, chromatic_px=(0.7, 0.3), sharpen=0.6, jpeg_quality=80),
    )
}
"""Named profiles. Those of CAMELYON17's centres are not among them: they measure robustness here."""


def get_profile(name: str) -> ScannerProfile:
    """The profile of a name, or of a YAML file.

    Raises:
        ValueError: no such profile; names the nearest ones.
        StoreError: the file is of another kind.
    """
    if name in PROFILES:
        return PROFILES[name]
    if Path(name).suffix in (".yaml", ".yml"):
        return ScannerProfile.load(name)
    near = difflib.get_close_matches(name, PROFILES, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(PROFILES)}, or give a YAML file."
    raise ValueError(f"there is no scanner profile {name!r}: {hint}")


class ScannerSwap(A.ImageOnlyTransform):
    """One of several known scanners.

    Args:
        profiles: names in `PROFILES` or YAML files; all of the former by default.
        severity: range of how far to go, 0 (nothing) to 1 (the whole profile).
        p: probability.
    """

    def __init__(
        self, profiles: Sequence[str] | None = None, severity: tuple[float, float] = (0.5, 1.0), p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.profiles = None if profiles is None else list(profiles)
        self.severity = ordered_range("severity", severity)
        for end in self.severity:
            checked_severity(end)
        self._loaded = [get_profile(name) for name in self.profiles or list(PROFILES)]

    def get_params(self) -> dict[str, Any]:
        """Draw a profile, a severity and a seed."""
        draw = self.py_random
        return {
            "profile": draw.randrange(len(self._loaded)),
            "swap_severity": draw.uniform(*self.severity),
            "scanner_seed": draw.getrandbits(31),
        }

    def apply(self, img: Rgb, profile: int, swap_severity: float, scanner_seed: int, **params: Any) -> Rgb:
        """Scan one image anew."""
        return self._loaded[profile].apply(img, severity=swap_severity, seed=scanner_seed)
