"""What is recorded about embeddings: the header that decides on reuse, and attributes by customary names."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from pathokd._version import __version__
from pathokd.embed.store import SCHEMA, StoredDtype
from pathokd.errors import StoreError
from pathokd.files import Header, file_mark, fingerprint, make_header
from pathokd.models import ModelCard, Readout
from pathokd.models.outside import OutsideCard
from pathokd.slides.manifest import TileSpec
from pathokd.slides.slide import Slide

_MAGNIFICATIONS = (1.25, 2.5, 5, 10, 20, 40, 80)


class ModelFacts(NamedTuple):
    """The model, and how it is run."""

    card: ModelCard | OutsideCard
    weights_sha256: str
    readout: Readout | Literal["output"]
    """`output` is what a network from elsewhere returns."""
    precision: str

    @property
    def origin(self) -> dict[str, str]:
        """Class and transform of a network from elsewhere; nothing for one that a card describes."""
        if isinstance(self.card, ModelCard):
            return {}
        return {"encoder_class": self.card.encoder_class, "transform": self.card.transform}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to pictures before the weights see them; other numbers here make other features."""
        if isinstance(self.card, ModelCard):
            return {"image_px": self.card.image_px, "mean": list(self.card.mean), "std": list(self.card.std)}
        return dict(self.origin)


def embedding_header(
    model: ModelFacts, slide_id: str, tiles: pd.DataFrame, spec: TileSpec, dtype: StoredDtype
) -> Header:
    """What must agree before a slide's file is reused: the model, its arithmetic, the tiles, and the slide itself.

    Which slide it is stands in a part of its own, `slide`: its path may change, what is in it may not.
    """
    card = model.card
    header = make_header(
        SCHEMA,
        {
            "slide_id": slide_id,
            "encoder": card.name,
            "weights_sha256": model.weights_sha256,
            **model.preprocessing,
            "readout": model.readout,
            "precision": model.precision,
            "dtype": dtype,
            "mpp": spec.mpp,
            "tile_px": spec.tile_px,
            "icc": spec.icc,
            "tiles": fingerprint([tiles["x"].tolist(), tiles["y"].tolist(), tiles["flag"].tolist()]),
        },
    )
    path = str(tiles["path"].iloc[0])
    slide = {"path": path, "mark": file_mark(path), "mpp_level0": float(tiles["mpp_level0"].iloc[0])}
    return {**header, "slide": slide}


def check_slide(found: Header, wanted: Header, where: Path) -> None:
    """Refuse to take the features of one slide for those of another of its name.

    A slide that was moved is the same one. One that is out of reach cannot be compared, nor can early files, which do
    not say which slide they are of.

    Raises:
        StoreError: names both slides.
    """
    have, want = found.get("slide", {}), wanted["slide"]
    for fact, what in (("mark", "content"), ("mpp_level0", "mpp")):
        if None not in (have.get(fact), want[fact]) and have[fact] != want[fact]:
            raise StoreError(
                f"{where} holds features of {have.get('path')} ({have.get('mpp_level0')} um/px), this run asks for "
                f"{want['path']} ({want['mpp_level0']} um/px), of the same name and another {what}: choose another "
                "output folder, give the slides different ids, or pass --overwrite to replace it."
            )


def geometry_attrs(slide: Slide, slide_id: str, tiles: pd.DataFrame, spec: TileSpec) -> dict[str, Any]:
    """Attributes of `coords` by the names MIL tools look for; the exact figures are the `mpp_*`."""
    mpp0 = float(tiles["mpp_level0"].iloc[0])
    stride = spec.stride_px or spec.tile_px
    return {
        "name": slide_id,
        "patch_size": spec.tile_px,
        "patch_size_level0": round(spec.tile_px * spec.mpp / mpp0),
        "patch_level": 0,
        "overlap": spec.tile_px - stride,
        "level0_magnification": _magnification(mpp0),
        "target_magnification": _magnification(spec.mpp),
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
        "mpp_level0": mpp0,
        "mpp_target": spec.mpp,
        "mpp_source": slide.mpp_source,
    }


def model_attrs(model: ModelFacts, slide_id: str, header: Header, slide: Slide) -> dict[str, Any]:
    """Attributes of `features`: which model made them, and how; of which colours, a slide without a profile decides."""
    return {
        "encoder": model.card.name,
        "name": slide_id,
        "weights_sha256": header["settings"]["weights_sha256"],
        "precision": model.precision,
        "readout": model.readout,
        **model.origin,
        "colour": "icc-to-srgb" if slide.icc and slide.icc_profile else "as stored",
        "version": __version__,
        "config_hash": fingerprint(header["settings"]),
    }


def _magnification(mpp: float) -> float:
    """The nominal magnification nearest to `mpp`, taking 0.5 um per pixel as 20x."""
    return float(min(_MAGNIFICATIONS, key=lambda power: abs(math.log(power * mpp / 10))))


def mismatches(card: ModelCard | OutsideCard, spec: TileSpec) -> list[str]:
    """What about the tiles is not what the model's card expects, one sentence each; empty if all fits."""
    if not isinstance(card, ModelCard):
        return []  # its transform takes what comes, and nobody says what it was trained on
    found = []
    if card.mpp is not None and abs(spec.mpp - card.mpp) > 0.02 * card.mpp:
        found.append(
            f"{card.name} expects {card.mpp:g} um/px and gets tiles at {spec.mpp:g}: its features may degrade."
        )
    if spec.tile_px != card.image_px:
        found.append(f"{card.name} expects {card.image_px} px and gets tiles of {spec.tile_px} px.")
    return found
