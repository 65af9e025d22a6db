"""Writes random tensors as safetensors files, a few MiB at a time, however large they are.

The format: 8 bytes little-endian header length, a JSON header with dtype, shape and byte range of each tensor,
then the bytes (safetensors documentation, "Format"). Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tprt.errors import ConfigError

DType = Literal["bfloat16", "float16", "float32"]

ITEM_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
INDEX = "model.safetensors.index.json"
_NAMES: dict[DType, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MANTISSA_BITS: dict[DType, int] = {"bfloat16": 7, "float16": 10, "float32": 23}
# As models are initialised; activations stay small through many layers.
_STD = 0.02
# No multiple of a row or page, so that what is shifted by one of those is not what was there.
_BLOCK_ELEMENTS = (1 << 20) + 7
_ALIGNMENT = 8

Shapes = Mapping[str, tuple[int, ...]]
Bits = NDArray[np.uint16] | NDArray[np.uint32]


def write_checkpoint(folder: Path, tensors: Shapes, dtype: DType, num_files: int, seed: int) -> None:
    """Write `tensors` into `num_files` files of about equal size, with an index where it is more than one.

    Matrices are drawn around 0, norms between 0.5 and 1.5. The same seed gives the same bytes.

    Raises:
        ConfigError: fewer tensors than files.
        OSError: the disk is full or may not be written.
    """
    source = _RandomTensors(dtype, seed)
    parts = _split(tensors, num_files)
    names = _file_names(num_files)
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, dtype, source)
    if num_files > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        total = sum(math.prod(shape) for shape in tensors.values()) * ITEM_BYTES[dtype]
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _file_names(num_files: int) -> list[str]:
    if num_files == 1:
        return ["model.safetensors"]
    return [f"model-{file:05d}-of-{num_files:05d}.safetensors" for file in range(1, num_files + 1)]


def _split(tensors: Shapes, num_files: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the sequence of tensors into parts of about equal size, none of them empty."""
    if not 1 <= num_files <= len(tensors):
        raise ConfigError(f"{len(tensors)} tensors into {num_files} files: expected 1 to {len(tensors)} files")
    total = sum(math.prod(shape) for shape in tensors.values())
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    written = 0
    for place, (name, shape) in enumerate(tensors.items()):
        size = math.prod(shape)
        num_left = num_files - len(parts)
        is_full = written + size / 2 > total * len(parts) / num_files
        if parts[-1] and num_left and (is_full or len(tensors) - place == num_left):
            parts.append({})
        parts[-1][name] = shape
        written += size
    return parts


def _write_file(path: Path, tensors: Shapes, dtype: DType, source: _RandomTensors) -> None:
    # safetensors' own writer sorts by name, too
    ordered = dict(sorted(tensors.items()))
    with path.open("wb") as file:
        _write_header(file, ordered, dtype)
        for name, shape in ordered.items():
            for block in source.blocks(name, shape):
                file.write(block.data)


def _write_header(file: BinaryIO, tensors: Shapes, dtype: DType) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    file.write(len(raw).to_bytes(8, "little"))
    file.write(raw)


class _RandomTensors:
    """Random numbers at the speed of memory: one block of them, again and again, each time a little changed.

    Every tensor begins somewhere else in the block, and in each repetition the mantissas are changed by bits of
    its own, so that bytes taken from a wrong place are seen to be wrong.
    """

    def __init__(self, dtype: DType, seed: int) -> None:
        self._dtype = dtype
        self._seed = seed
        draws = np.random.default_rng(seed).standard_normal(_BLOCK_ELEMENTS, dtype=np.float32) * _STD
        self._block = _to_bits(draws, dtype)

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[Bits]:
        """Yield the tensor's numbers as their bits, piece by piece."""
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        left = math.prod(shape)
        if name.endswith("norm.weight"):
            yield _to_bits(random.uniform(0.5, 1.5, left).astype(np.float32), self._dtype)
            return
        begin = int(random.integers(_BLOCK_ELEMENTS))
        while left:
            piece = self._block[begin : begin + left]
            begin = 0
            left -= len(piece)
            change = random.integers(1 << _MANTISSA_BITS[self._dtype])
            yield piece ^ piece.dtype.type(change)


def _to_bits(values: NDArray[np.float32], dtype: DType) -> Bits:
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    # bfloat16 is the upper half of float32
    return (values.view(np.uint32) >> 16).astype(np.uint16)
