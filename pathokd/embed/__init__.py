"""From tiles and an exported model to stored vectors: one HDF5 file per slide, as MIL code reads it."""

from pathokd.embed.convert import convert_embeddings
from pathokd.embed.embedder import Embedder, Precision
from pathokd.embed.run import PackedEmbeddings, embed_packed, embed_slides
from pathokd.embed.slide import EmbeddedSlide
from pathokd.embed.store import (
    SlideEmbeddings,
    StoredDtype,
    read_embeddings,
    read_good,
    read_header,
    write_embeddings,
)
from pathokd.embed.verify import Verdict, verify_embeddings

__all__ = [
    "EmbeddedSlide",
    "Embedder",
    "PackedEmbeddings",
    "Precision",
    "SlideEmbeddings",
    "StoredDtype",
    "Verdict",
    "convert_embeddings",
    "embed_packed",
    "embed_slides",
    "read_embeddings",
    "read_good",
    "read_header",
    "verify_embeddings",
    "write_embeddings",
]
