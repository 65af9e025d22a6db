"""The tensors of a safetensors checkpoint: one file, several, or several with an index.

Only headers are read here, and each is checked against its file, so that a truncated or damaged one is
refused before any memory is filled. The format: 8 bytes little-endian header length, a JSON header with
dtype, shape and byte range of each tensor, then the bytes (safetensors documentation, "Format"). Knows
nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tprt.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_ITEM_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_LOADABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the checkpoint: where it is, and its type and shape.

    Attributes:
        offset: its first byte, counted from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a checkpoint by name."""

    folder: Path
    tensors: dict[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())


def open_checkpoint(folder: str) -> Checkpoint:
    """Read the headers of the checkpoint in `folder`; no weight is read.

    Raises:
        CheckpointError: no safetensors there, a file of the index is missing, a file is truncated or its
            header is wrong, a tensor is there twice, or has a type that is not loaded.
    """
    path = Path(folder)
    tensors: dict[str, TensorEntry] = {}
    for file in _files(path):
        for entry in _read_header(file):
            if entry.name in tensors:
                other = tensors[entry.name].file.name
                raise CheckpointError(f"{file}: tensor {entry.name!r} is in {other} too; expected it once")
            tensors[entry.name] = entry
    return Checkpoint(path, tensors)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"model.path: there is no folder {str(folder)!r}")
    index = folder / _INDEX
    if index.is_file():
        return _indexed_files(index)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    advice = ""
    if pickled:
        advice = f"; {pickled[0]} can run code when it is opened and is not read: convert it to safetensors"
    raise CheckpointError(f"{folder} holds no *.safetensors file{advice}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: expected JSON with a weight_map of tensor to file: {error}") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: file names must not leave the folder, found {names}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _read_header(file: Path) -> Iterable[TensorEntry]:
    """Yield the tensors of one file after checking its header against its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file} has {size} bytes and announces a header of {length}: it is truncated or no safetensors"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is {type(header).__name__}; expected a JSON object")
    header.pop("__metadata__", None)
    end = 0
    data_start = 8 + length
    for begin, stop, name, fields in _ordered(file, header):
        if begin != end:
            raise CheckpointError(
                f"{file}: tensor {name!r} begins at byte {begin} of the data; expected {end}: tensors must"
                " neither overlap nor leave gaps"
            )
        end = stop
        yield TensorEntry(name, file, fields["dtype"], tuple(fields["shape"]), data_start + begin)
    if data_start + end != size:
        raise CheckpointError(
            f"{file} has {size} bytes but its header describes {8 + length + end}: it is truncated or damaged;"
            " fetch it again"
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def _ordered(file: Path, header: dict[str, Any]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """Return (first byte, end, name, fields) of each tensor, checked one by one, in the order of the bytes."""
    entries = []
    for name, fields in header.items():
        if not _is_sound(fields):
            raise CheckpointError(f"{file}: the header describes tensor {name!r} wrongly: {fields!r}")
        if fields["dtype"] not in _LOADABLE:
            found = fields["dtype"]
            raise CheckpointError(f"{file}: tensor {name!r} is {found}; tprt loads {', '.join(_LOADABLE)}")
        begin, stop = fields["data_offsets"]
        entries.append((begin, stop, name, fields))
    return sorted(entries, key=lambda entry: entry[:3])


def _is_sound(fields: object) -> bool:
    """Whether a tensor's type, shape and byte range are there and agree."""
    if not isinstance(fields, dict):
        return False
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    # bool is a kind of int, and neither a size nor an offset
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return False
    return (
        isinstance(dtype, str)
        and dtype in _ITEM_BYTES
        and offsets[1] - offsets[0] == math.prod(shape) * _ITEM_BYTES[dtype]
    )
