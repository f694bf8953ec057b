"""Checkpoints in shards: a folder in which each process wrote its own part of a training's tensors.

The folder holds one subfolder of `torch.distributed.checkpoint`, under a name of its own, and `meta.pt`: everything of
the checkpoint that is no shard, with the subfolder's name. Each write makes a new subfolder and replaces `meta.pt` when
all processes are done, so that a kill at any moment leaves the checkpoint before or the new one, and never half of one:
without `meta.pt` a folder is no checkpoint, and a subfolder that it does not name is swept away by the next write.

All processes must write to one folder, so several nodes need a file system that they share.
"""

import contextlib
import inspect
import io
import pickle
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pathokd.errors import PathokdError, StoreError, WeightsError
from pathokd.files import atomic_path
from pathokd.processes import gather_objects, process_rank

META = "meta.pt"
SHARDS = "shards"
"""Key in `meta.pt`: the name of the subfolder."""
MODEL = "state_dict"
_INDEX = ".metadata"
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint in shards lies there, whole."""
    return (Path(path) / META).is_file()


def is_checkpoint(path: str | Path) -> bool:
    """Whether a checkpoint lies there, in one file or in shards; half a folder is none."""
    return Path(path).is_file() or is_sharded(path)


def sweep_half(path: str | Path) -> None:
    """Remove what a run that was killed at its first write left there; a whole checkpoint, or anything else, stays."""
    path = Path(path)
    files = [found for found in path.rglob("*") if not found.is_dir()]
    ours = all(found.name.startswith(_INDEX) or found.suffix in (".distcp", ".part") for found in files)
    if path.is_dir() and not is_sharded(path) and ours:
        shutil.rmtree(path, ignore_errors=True)


def write_shards(tensors: dict[str, Any], facts: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint; all processes together, each with its own parts.

    Args:
        tensors: nested dicts of tensors; the model's are under `state_dict`. Of DTensors each process writes what it
            holds, of others, which must be the same everywhere, one process does.
        facts: everything else, plain data; that of the first process counts.
        path: folder; what it held is replaced once the new one is whole.

    Raises:
        StoreError: a process could not write, or they do not see one folder.
    """
    path = Path(path)
    name = gather_objects(uuid.uuid4().hex[:8])[0]
    folder = path / name
    with _as_sentences(f"Cannot write {path}", "Free some space or choose another output folder; the last one stays"):
        save(tensors, storage_writer=FileSystemWriter(folder), **_alone(not dist.is_initialized()))
    trouble: str | None = None
    if process_rank() == 0:  # the others hear of it: one that raises alone lets them wait for ever
        try:
            _commit(path, name, facts)
        except (PathokdError, OSError) as error:
            trouble = str(error)
    trouble = gather_objects(trouble)[0]
    if trouble is not None:
        raise StoreError(trouble)


def _commit(path: Path, name: str, facts: dict[str, Any]) -> None:
    """Make the shards in the subfolder `name` the checkpoint."""
    wanted = {info.relative_path for info in _index(path / name).storage_data.values()}
    missing = sorted(file for file in wanted if not (path / name / file).is_file())
    if missing:
        raise StoreError(
            f"{path / name} lacks {', '.join(missing)}, which another process wrote elsewhere: give --out a folder "
            "that all nodes share."
        )
    buffer = io.BytesIO()  # torch's own writer hides what the system says of a full disk
    torch.save({**facts, SHARDS: name}, buffer)
    with atomic_path(path / META) as part:
        part.write_bytes(buffer.getvalue())
    for other in path.iterdir():
        if other.is_dir() and other.name != name:
            shutil.rmtree(other, ignore_errors=True)


def read_facts(path: str | Path) -> dict[str, Any]:
    """What lies beside the shards.

    Raises:
        WeightsError: the file is damaged, or its shards are missing.
    """
    meta = Path(path) / META
    try:
        facts: dict[str, Any] = torch.load(meta, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{meta} cannot be read ({type(error).__name__}): copy the checkpoint again.") from error
    if not (Path(path) / str(facts.get(SHARDS)) / _INDEX).is_file():
        raise WeightsError(f"{path} lacks the shards that its {META} names: copy the whole checkpoint again.")
    return facts


def read_shards(tensors: dict[str, Any], path: str | Path) -> None:
    """Fill `tensors` from a checkpoint, in place; all processes together, each its own parts.

    Args:
        tensors: nested dicts as `write_shards` was given them, or some of them.
        path: folder.

    Raises:
        WeightsError: a tensor or a shard is missing, damaged or of another shape.
    """
    folder = Path(path) / read_facts(path)[SHARDS]
    _index(folder)
    _load(tensors, folder, alone=not dist.is_initialized())


def read_whole(path: str | Path) -> dict[str, Any]:
    """Facts and the model's whole `state_dict`, on the CPU; by one process, without the optimiser's state.

    Raises:
        WeightsError: a shard is missing or damaged.
    """
    facts = read_facts(path)
    folder = Path(path) / facts[SHARDS]
    state: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in _model_entries(folder).items()
    }
    _load({MODEL: state}, folder, alone=True)
    return {**facts, MODEL: state}


def model_shapes(path: str | Path) -> dict[str, torch.Size]:
    """The shape of each tensor of the model's `state_dict`; nothing is read but the index.

    Raises:
        WeightsError: the index is missing or damaged.
    """
    return {name: entry.size for name, entry in _model_entries(Path(path) / read_facts(path)[SHARDS]).items()}


def _model_entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    return {
        name.removeprefix(f"{MODEL}."): entry
        for name, entry in _index(folder).state_dict_metadata.items()
        if name.startswith(f"{MODEL}.") and isinstance(entry, TensorStorageMetadata)
    }


def _load(tensors: dict[str, Any], folder: Path, *, alone: bool) -> None:
    try:
        with _as_sentences(f"Cannot read {folder}", "Copy the checkpoint again, or resume with the model it is of"):
            load(tensors, storage_reader=FileSystemReader(folder), **_alone(alone))
    except StoreError as error:
        raise WeightsError(str(error)) from error


def _alone(alone: bool) -> dict[str, bool]:
    """Argument of `save` and `load`; early torch (2.6) finds out by itself whether there are other processes."""
    return {"no_dist": alone} if "no_dist" in inspect.signature(load).parameters else {}


@contextlib.contextmanager
def _as_sentences(what: str, remedy: str) -> Iterator[None]:
    """Turn what goes wrong on any process, which torch raises past `except Exception`, into a StoreError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone is meant
            yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise StoreError(f"{what} ({type(first).__name__}: {_one_line(first)}). {remedy}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{what} ({type(error).__name__}: {_one_line(error)}). {remedy}.") from error


def _one_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


class _IndexUnpickler(pickle.Unpickler):
    """Reads torch's index of shards, a pickle, and nothing else that a pickle could do."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what an index is made of."""
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if a_dtype or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _index(folder: Path) -> Metadata:
    """The index of shards, looked through before torch unpickles it.

    Raises:
        WeightsError: it is damaged, or holds what no index needs.
    """
    try:
        with open(folder / _INDEX, "rb") as file:
            found = _IndexUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
    except Exception as error:
        raise WeightsError(
            f"{folder / _INDEX} is no index of shards ({_one_line(error)}): take a checkpoint that `pathokd fit` wrote."
        ) from error
    return found
