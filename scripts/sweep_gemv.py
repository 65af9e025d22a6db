"""Times products with few rows, cut in other ways than `tprt/kernels/gemv_tiles.py` chooses, on one GPU.

Usage: python -m scripts.sweep_gemv [--rows 1,8] [--limit-s SECONDS]

For each weight: what cuBLAS takes, then the fastest tiles, with what is chosen now marked `*`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from scripts.bench_kernels import DTYPE, MODELS, copies_of, launch_us, rand
from tprt.kernels.gemv import multiply_with
from tprt.kernels.gemv_tiles import DotTile, VectorTile, tile_for

_SHOWN = 4


def tiles(rows: int) -> Iterator[VectorTile | DotTile]:
    """Yield the tiles to try."""
    if rows <= 4:
        for warps, columns in product((1, 2, 4, 8), (1, 2, 4, 8)):
            yield VectorTile(columns, 256 * warps, warps)
    if rows > 1:
        for columns, inputs, splits, warps in product((16, 32), (128, 256), (1, 2, 4), (2, 4)):
            yield DotTile(columns, inputs, splits, warps, num_stages=4)


def sweep(rows: int, name: str, shape: tuple[int, int], deadline: float) -> str:
    """Time all tiles for a weight of `shape`, those of now first."""
    copies = copies_of(shape[0] * shape[1] * DTYPE.itemsize)
    x, weights, now = rand(rows, shape[1]), rand(copies, *shape), tile_for(rows, *shape)
    found = []
    for tile in dict.fromkeys([*([] if now is None else [now]), *tiles(rows)]):

        def launch(index: int, tile: VectorTile | DotTile = tile) -> object:
            return multiply_with(tile, x, weights[index], None)

        try:
            found.append((launch_us(launch, copies), f"{'*' if tile == now else ' '} {tile}"))
        except OutOfResources:
            continue
        if time.monotonic() > deadline:
            break
    theirs = launch_us(lambda index: functional.linear(x, weights[index]), copies)
    best = "\n".join(f"  {us:8.2f} {text}" for us, text in sorted(found)[:_SHOWN])
    return f"{name} {shape[0]}x{shape[1]}, {rows} rows: cuBLAS {theirs:.2f} us\n{best}"


def main(arguments: Sequence[str]) -> int:
    """Print the tiles; return 1 if the time was up before the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--limit-s", type=float, default=400.0)
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    deadline = time.monotonic() + options.limit_s
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for rows, model in product([int(rows) for rows in options.rows.split(",")], MODELS):
        for name, shape in model.products().items():
            print(f"{model.name} {sweep(rows, name, shape, deadline)}", flush=True)
            if time.monotonic() > deadline:
                print(f"stopped after {options.limit_s:g} s; --limit-s gives it more")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
