"""Whole files or none: atomic writes, fingerprints, and the headers that decide whether a result may be reused."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import time
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from pathokd._version import __version__
from pathokd.errors import StoreError

Header = dict[str, Any]
"""JSON-able facts about a file: `schema`, `version`, and the settings that made it."""


_NO_FOLDER = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # a file where a folder should be, or the reverse
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, *_NO_FOLDER)


BROKEN_ARRAY = (
    OSError, ValueError, EOFError, TypeError, KeyError, RuntimeError, MemoryError,
    tokenize.TokenError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What NumPy and h5py raise, depending on the byte, for arrays in a file that is cut off or damaged."""

_SAMPLE_BYTES = 4096
LEFTOVER_S = 3600.0
"""A temporary file nothing was written to for so long belongs to no living process."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on failure.

    A reader therefore sees the old file, the new file, or none, also after SIGKILL. The temporary name starts with
    a dot and ends in `.part` so that globs for results never match it.

    Raises:
        StoreError: the disk is full, or the folder cannot be written to or is none.
    """
    target = Path(path)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        number = _system_error(error)
        # Only troubles of *this* write become a StoreError; an unreadable input keeps its own error.
        filename = getattr(error, "filename", None)
        named = {Path(os.fsdecode(filename))} if isinstance(filename, str | bytes) else set()
        if number in _UNWRITABLE and named <= {part, target, *target.parents}:
            if number in _NO_FOLDER:
                raise StoreError(f"Cannot write {target}: {_in_the_way(target)}; name another output.") from error
            raise StoreError(
                f"Cannot write {target}: {os.strerror(number)}. Free some space or choose another output folder; "
                "nothing half-written was left behind."
            ) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            part.unlink()


def remove_leftovers(folder: str | Path, names: str) -> None:
    """Delete temporary files that killed runs left behind in a folder.

    Args:
        folder: where; others may be writing to it.
        names: glob of the files that were to be, as `*.h5`.
    """
    for part in Path(folder).glob(f".{names}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - part.stat().st_mtime > LEFTOVER_S:
                part.unlink()


def _in_the_way(target: Path) -> str:
    """What stands where a file, or the folder it goes into, should be."""
    file = next((folder for folder in target.parents if folder.exists() and not folder.is_dir()), None)
    return f"{target} is a folder" if file is None else f"{file} is a file, not a folder"


def _system_error(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors, whose errors are no OSError, has it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_file(path: str | Path, example: str) -> None:
    """Refuse, before the work, to write a file where a folder is.

    Args:
        path: where the file goes.
        example: of a name for it.

    Raises:
        StoreError: a folder of that name is there.
    """
    if Path(path).is_dir():
        raise StoreError(f"{path} is a folder: name the file to write, such as {path}/{example}.")


def check_folder(path: str | Path) -> None:
    """Refuse, before the work, to write a folder where a file is.

    Raises:
        StoreError: a file of that name is there.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise StoreError(f"{path} is a file: name a folder for the output.")


def check_summary(path: str | Path, columns: Iterable[str], verb: str) -> None:
    """Refuse to write a summary over the table of another verb or program.

    Args:
        path: where the summary goes.
        columns: what only summaries of this verb have together.
        verb: of `pathokd`, for the message.

    Raises:
        StoreError: something else is there.
    """
    if not Path(path).exists():
        return
    try:
        with open(path, newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        found = []
    if not {*columns} <= {*found}:
        raise StoreError(f"{path} is there and no summary of `pathokd {verb}`: choose another output folder.")


def read_yaml(path: str | Path, schema: str, part: str, remedy: str) -> Any:
    """One part of a YAML file that begins with `make_header(schema, ...)`.

    Args:
        path: the file.
        schema: what its header must say.
        part: the key beside the header.
        remedy: how to make such a file, for messages.

    Raises:
        StoreError: there is no such file, or it is of another kind.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StoreError(f"{path} cannot be read ({error}): {remedy}.") from error
    if not isinstance(found, dict) or found.get("schema") != schema or part not in found:
        raise StoreError(f"{path} should hold {part} of schema {schema} and does not: {remedy}.")
    return found[part]


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that identify a JSON-able value (SHA-256 of its canonical JSON)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_mark(path: str | Path) -> str | None:
    """What tells a file from another of its name, wherever it lies: its size and eight small samples of its bytes.

    Slides are too large to hash whole for each run that skips them.

    Returns:
        Sixteen hex digits; None if the file cannot be read.
    """
    digest, blocks = hashlib.sha256(), 8
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for number in range(blocks):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (blocks - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:16]


def make_header(schema: str, settings: Mapping[str, Any]) -> Header:
    """Header of a result file: `schema` as NAME/VERSION, the package version, and the settings that made it."""
    return {"schema": schema, "version": __version__, "settings": dict(settings)}


def check_header(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
    """Accept `found` only if it was made by the same schema and settings as `wanted`.

    The package version may differ: it is recorded for people, the schema decides for programs.

    Raises:
        StoreError: names the first field that differs, with both values.
    """
    for field, have, want in _differences(found, wanted):
        raise StoreError(
            f"{path} was made with {field} = {have!r}, this run asks for {want!r}: "
            "pass --overwrite to redo it, or another output folder."
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    if found.get("schema") != wanted["schema"]:
        yield "schema", found.get("schema"), wanted["schema"]
    have, want = found.get("settings", {}), wanted["settings"]
    for field in sorted({*have, *want}):
        if have.get(field) != want.get(field):
            yield field, have.get(field), want.get(field)
