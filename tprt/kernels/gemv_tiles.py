"""How `gemv.py` cuts its work, by the shape of the product alone. Knows nothing of Triton.

`scripts/sweep_gemv.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

_VECTOR_ROWS = 2
_FEW_ROWS, _DOT_ROWS = 16, 64
# cuBLAS keeps all processors busy where a weight has more numbers than this, with few and with many rows.
_LARGE_WEIGHT, _LARGE_WEIGHT_OF_MANY = 96 << 20, 8 << 20
# Programs of so many rows that are enough for the processors of a large GPU.
_MANY_PROGRAMS = 128
# Inputs that a program of narrow tiles goes through at most.
_LONGEST_SHARE = 8192


@dataclass(frozen=True, slots=True)
class VectorTile:
    """A program multiplies `columns` rows of the weight, `inputs` of each at a time, in registers."""

    columns: int
    inputs: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class DotTile:
    """A program multiplies `columns` rows of the weight, `inputs` of each at a time, on tensor cores.

    `splits` programs share the inputs.
    """

    columns: int
    inputs: int
    splits: int
    num_warps: int
    num_stages: int


@cache
def tile_for(rows: int, columns: int, inputs: int) -> VectorTile | DotTile | None:
    """Return the tile for `[rows, inputs]` times `[columns, inputs]`; None where cuBLAS is as fast."""
    if not 1 <= rows <= _DOT_ROWS or columns < 1 or inputs < 1:
        return None
    if rows <= _VECTOR_ROWS:
        return _vector_tile(columns, inputs)
    # Tensor cores read 16 bytes at a time: rows of the weight have to begin at multiples of them.
    if inputs % 8 or columns * inputs > (_LARGE_WEIGHT if rows <= _FEW_ROWS else _LARGE_WEIGHT_OF_MANY):
        return None
    return _dot_tile(columns, inputs) if rows <= _FEW_ROWS else _dot_tile_of_many(columns, inputs)


def _vector_tile(columns: int, inputs: int) -> VectorTile:
    """Take all threads along the inputs, eight numbers each, and so few columns that programs are many."""
    wide = 1024 if inputs > 512 else 256
    return VectorTile(2 if columns <= 4096 else 4, wide, 4)


def _dot_tile(columns: int, inputs: int) -> DotTile:
    """Take wide tiles where they are programs enough; a short sum in small pieces, all under way at once.

    Each was the best of some 30 in a captured step of the Qwen3-0.6B or 8B shape, at eight rows on an H100.
    """
    if columns >= 48 * _MANY_PROGRAMS:
        return DotTile(32, 128, 1, 4 if columns <= 96 * _MANY_PROGRAMS else 2, 4)
    if inputs <= 1024 and columns >= 16 * _MANY_PROGRAMS:
        return DotTile(16, 64, 1, 2, 8)
    splits = _splits(columns, inputs, 2 * _MANY_PROGRAMS)
    # One program alone would be long at many inputs.
    splits = max(splits, -(-inputs // _LONGEST_SHARE))
    return DotTile(16, 256, splits, 2, 3 if inputs // splits > 512 else 4)


def _dot_tile_of_many(columns: int, inputs: int) -> DotTile:
    """Take wide tiles where they are programs enough: each reads all rows of the input."""
    if columns >= 32 * _MANY_PROGRAMS:
        return DotTile(32, 128, 1, 4, 4)
    piece, num_stages = (256, 3) if inputs <= 2048 else (128, 4)
    return DotTile(16, piece, _splits(columns, inputs, _MANY_PROGRAMS), 4, num_stages)


def _splits(columns: int, inputs: int, num_programs: int) -> int:
    """Return into how many parts to cut the inputs for so many programs of 16 columns; parts stay 512 long."""
    splits = 1
    while -(-columns // 16) * splits < num_programs and inputs // (2 * splits) >= 512:
        splits *= 2
    return splits
