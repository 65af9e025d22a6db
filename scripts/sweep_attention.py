"""Times the Triton attention kernels with other tiles and splits than `triton_tiles.py` chooses, on one GPU.

Usage: sweep_attention.py [--limit-s SECONDS]

Each line is one choice, with a figure for each case; `*` marks what `triton_tiles.py` chooses. Knows nothing of
the other backends.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from triton.runtime.errors import OutOfResources

from scripts.bench_attention import DTYPE, HEAD_DIM, HEADS, Case, Pool, decode_us, prefill_us
from tprt.attention import triton as backend_module
from tprt.attention.triton import TritonBackend
from tprt.attention.triton_tiles import Tile, Traits, decode_tile, num_splits, prefill_tile

_CASES = [Case(*HEADS[0], 16, *size) for size in ((1, 1024), (8, 1024), (64, 1024), (256, 192), (256, 640))]
_DECODE_TILES = [
    Tile(16, tokens, warps, stages)
    for tokens, warps in ((16, 1), (32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8))
    for stages in (2, 3, 4)
]
_SPLIT_COUNTS = {1: (8, 16, 32, 64), 8: (2, 4, 8, 16), 64: (1, 2, 4), 256: (1, 2)}
_PREFILL_TILES = [
    Tile(rows, tokens, warps, stages)
    for rows, tokens, warps in (
        (64, 64, 4),
        (64, 128, 4),
        (128, 32, 4),
        (128, 64, 4),
        (128, 64, 8),
        (128, 128, 8),
    )
    for stages in (2, 3, 4)
]
_PROMPT = 8192


def _try(measure: Callable[[], float]) -> str:
    """Return the figure, or a dash where the tile does not fit the device."""
    try:
        return f"{measure():9.1f}"
    except OutOfResources:
        return f"{'-':>9}"


def _set(name: str, choice: object) -> None:
    """Make the backend choose that, whatever the shapes."""
    setattr(backend_module, name, lambda *shapes: choice)


def _heading(title: str) -> str:
    columns = "".join(f"{f'{case.batch_size}x{case.context_len}':>9}" for case in _CASES)
    return f"\n{title:32}{columns}"


def sweep_lines(deadline_s: float) -> Iterator[str]:
    """Yield the lines of all sweeps; decode in us per layer, prefill in TFLOP/s."""
    for lines in (_decode_tiles(), _split_counts(), _prefill_tiles()):
        for line in lines:
            yield line
            if time.monotonic() > deadline_s:
                yield "stopped: --limit-s is over"
                return


def _decode_tiles() -> Iterator[str]:
    pool, backend = Pool(), TritonBackend(HEAD_DIM**-0.5)
    chosen = decode_tile(2, HEAD_DIM, DTYPE.itemsize, Traits.of(torch.device("cuda")), prepares=False)
    yield _heading("decode: tokens warps stages")
    for tile in _DECODE_TILES:
        _set("decode_tile", tile)
        mark = "*" if tile == chosen else ""
        row = f"{f'{tile.tokens} {tile.num_warps} {tile.num_stages} {mark}':32}"
        for case in _CASES:
            row += _try(lambda case=case: decode_us(backend, case, pool))  # type: ignore[misc]
        yield row
    _set("decode_tile", chosen)


def _split_counts() -> Iterator[str]:
    pool, backend = Pool(), TritonBackend(HEAD_DIM**-0.5)
    processors = Traits.of(torch.device("cuda")).processors
    yield "\ndecode: batch x tokens, splits: us per layer"
    for case in _CASES:
        chosen, row = num_splits(case.batch_size, case.kv_heads, processors), ""
        for splits in _SPLIT_COUNTS[case.batch_size]:
            _set("num_splits", splits)
            row += f"   {splits}{'*' if splits == chosen else ''}: {decode_us(backend, case, pool):.1f}"
        yield f"{case.batch_size}x{case.context_len}{row}"
    backend_module.num_splits = num_splits  # type: ignore[attr-defined]


def _prefill_tiles() -> Iterator[str]:
    backend = TritonBackend(HEAD_DIM**-0.5)
    chosen = prefill_tile(_PROMPT, HEAD_DIM, DTYPE.itemsize, Traits.of(torch.device("cuda")))
    yield f"\nprefill of {_PROMPT} tokens, TFLOP/s: rows tokens warps stages: own keys, blocks of 16"
    flop = 2 * _PROMPT**2 * HEADS[0][0] * HEAD_DIM
    for tile in _PREFILL_TILES:
        _set("prefill_tile", tile)
        row = f"{tile.rows} {tile.tokens} {tile.num_warps} {tile.num_stages}{' *' if tile == chosen else ''}:"
        for size in (0, 16):
            row += _try(lambda size=size: flop / prefill_us(backend, HEADS[0], _PROMPT, size) / 1e6)  # type: ignore[misc]
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sweeps; return 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Times the Triton attention kernels with other tiles.")
    parser.add_argument("--limit-s", type=float, default=170.0, help="stop after that long")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device found; this times GPU kernels")
        return 2
    for line in sweep_lines(time.monotonic() + options.limit_s):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
