"""What a DataLoader hands to the model, and where tiles come from."""

from typing import NamedTuple, NotRequired, Protocol, TypedDict

import pandas as pd
from jaxtyping import Int64, UInt8
from torch import Tensor

from pathokd.types import Rgb


class TileBatch(TypedDict):
    """A collated batch.

    views: view name to uint8 images, (batch, 3, height, width), or (batch, count, 3, height, width) of a crop that is
        drawn several times; views of one crop share their geometry.
    index: rows of the tile source.
    key: one name per tile, for messages.
    targets: teacher to its stored targets of these tiles, undecoded, by array name (`pathokd.data.targets`).
    place, condition: numbers of what tissue a tile shows and under which staining and scanner, where tiles are
        registered (`pathokd.data.places`).
    """

    views: dict[str, UInt8[Tensor, "batch *count 3 height width"]]
    index: list[int]
    key: list[str]
    targets: NotRequired[dict[str, dict[str, Tensor]]]
    place: NotRequired[Int64[Tensor, " batch"]]
    condition: NotRequired[Int64[Tensor, " batch"]]


class Draw(NamedTuple):
    """One visit to one tile: the whole identity of its random views.

    position: of the tile among those drawn from. epoch: the how-manieth visit.
    """

    position: int
    epoch: int


class TileSource(Protocol):
    """Random access to tiles. Implementations are picklable and safe to read from many threads."""

    @property
    def index(self) -> pd.DataFrame:
        """One row per tile: `key`, `slide_id`, `x`, `y` and every metadata column."""
        ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> Rgb:
        """The tile in `row`, uint8 (height, width, 3)."""
        ...
