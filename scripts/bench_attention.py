"""Times the attention backends on one GPU: decode in CUDA graphs, prefill, and copies beside them.

Usage: bench_attention.py [--json-lines FILE] [--limit-s SECONDS]

Decode: one graph of many layers, each with KV blocks of its own in a random order, together more than the L2
cache holds; the median of its replays over the number of layers, and the KV bytes over that. Prefill: one
sequence, causal. Knows nothing of models, and of how kernels are tuned (`sweep_attention.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TextIO

import torch
from torch import Tensor

from tprt.attention import AttentionBackend, AttentionSetup, make_attention_backend
from tprt.context import Context
from tprt.errors import ConfigError

BACKENDS = ("flash_attn_3", "flash_attn", "triton")
HEADS = ((16, 8), (32, 8))
BLOCK_SIZES = (16, 256, 32, 64)
BATCH_SIZES = (1, 8, 64, 256)
CONTEXTS = (192, 640, 1024, 4096)
PROMPTS = (2048, 8192)
HEAD_DIM = 128
DTYPE = torch.bfloat16
_REPLAYS = 20
# Of all layers of one graph; an H100 has 50 MB of L2 cache.
_KV_BYTES = 128 << 20
_MAX_LAYERS = 128


@dataclass(frozen=True)
class Case:
    """One decode step of `layers` layers."""

    heads: int
    kv_heads: int
    block_size: int
    batch_size: int
    context_len: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * self.batch_size * self.context_len * self.kv_heads * HEAD_DIM * DTYPE.itemsize

    @property
    def layers(self) -> int:
        return max(2, min(_MAX_LAYERS, _KV_BYTES // self.kv_bytes))

    @property
    def blocks(self) -> int:
        """KV blocks of one sequence."""
        return -(-self.context_len // self.block_size)


class Pool:
    """Random numbers that every case takes its KV blocks from."""

    def __init__(self) -> None:
        cases = [Case(*HEADS[0], 256, batch, context) for batch in BATCH_SIZES for context in CONTEXTS]
        # A context that ends inside a block takes all of it.
        size = max(2 * c.layers * c.batch_size * c.blocks * 256 * c.kv_heads * HEAD_DIM for c in cases)
        self._numbers = torch.empty(size, dtype=DTYPE, device="cuda")
        self._numbers.normal_()

    def caches(self, case: Case) -> Tensor:
        """Return `[layers, 2, N, block_size, kv, D]`."""
        shape = (
            *(case.layers, 2, case.batch_size * case.blocks),
            *(case.block_size, case.kv_heads, HEAD_DIM),
        )
        return self._numbers[: torch.Size(shape).numel()].view(shape)


def make_backends(block_size: int, tell: bool = False) -> dict[str, AttentionBackend]:
    """Return the backends that work here with that block size; `tell` why the others do not."""
    setup, found = AttentionSetup(torch.device("cuda"), DTYPE, HEAD_DIM, block_size), {}
    for name in BACKENDS:
        try:
            found[name] = make_attention_backend(name, HEAD_DIM**-0.5, setup)
        except ConfigError as error:
            if tell:
                print(error)
    return found


def replay_us(launch: Callable[[], object]) -> float:
    """Capture `launch` and return the median time of a replay, in microseconds."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for _ in range(2):
        graph.replay()
    return _median_us(graph.replay, _REPLAYS)


def _median_us(launch: Callable[[], object], count: int) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        launch()
        event.record()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in pairwise(events)]
    return 1000 * statistics.median(times)


def decode_us(backend: AttentionBackend, case: Case, pool: Pool) -> float:
    """Return microseconds per layer."""
    caches = pool.caches(case)
    query = torch.randn(case.batch_size, case.heads, HEAD_DIM, dtype=DTYPE, device="cuda")
    tables = torch.randperm(case.batch_size * case.blocks, device="cuda").int().view(case.batch_size, -1)
    lens = torch.full((case.batch_size,), case.context_len, dtype=torch.int32, device="cuda")
    context = Context(context_lens=lens, block_tables=tables, max_seqlen_k=case.context_len)
    return replay_us(lambda: [backend.decode(query, cache, context) for cache in caches]) / case.layers


def prefill_us(backend: AttentionBackend, heads: tuple[int, int], length: int, block_size: int) -> float:
    """Return microseconds for one prompt; with `block_size` 0 keys and values are not read from blocks."""
    query = torch.randn(length, heads[0], HEAD_DIM, dtype=DTYPE, device="cuda")
    size = block_size or length
    cache = torch.randn(2, length // size, size, heads[1], HEAD_DIM, dtype=DTYPE, device="cuda")
    ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    tables = torch.randperm(length // size, device="cuda").int().view(1, -1)
    context = Context(
        is_prefill=True,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=length,
        max_seqlen_k=length,
        block_tables=tables if block_size else None,
    )
    key, value = cache.flatten(1, 2).unbind()
    qkv = (query, key, value)
    for _ in range(3):
        backend.prefill(qkv, cache, context)
    return _median_us(lambda: backend.prefill(qkv, cache, context), 8)


def copy_tb_per_s() -> float:
    """Return the bandwidth of a copy of 1 GiB, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_us(lambda: target.copy_(source)) / 1e6


def decode_lines(pool: Pool, deadline_s: float, sink: TextIO | None) -> Iterator[str]:
    """Yield the table: a row for a batch, a column for a backend and block size, in us and TB/s."""
    backends = {size: make_backends(size) for size in BLOCK_SIZES}
    columns = [(name, size) for name in BACKENDS for size in BLOCK_SIZES if name in backends[size]]
    for heads in HEADS:
        yield f"\ndecode, {heads[0]}/{heads[1]} heads of {HEAD_DIM}: us per layer, TB/s of KV"
        yield "batch  tokens" + "".join(f"{name[:10] + '/' + str(size):>16}" for name, size in columns)
        for batch in BATCH_SIZES:
            for length in CONTEXTS:
                row = f"{batch:5}{length:8}"
                for name, size in columns:
                    if time.monotonic() > deadline_s:
                        yield row
                        yield "stopped: --limit-s is over"
                        return
                    case = Case(*heads, size, batch, length)
                    us = decode_us(backends[size][name], case, pool)
                    row += f"{us:11.1f}{case.kv_bytes / us / 1e6:5.2f}"
                    _note(sink, "decode", backend=name, us=us, **vars(case))
                yield row


def prefill_lines(sink: TextIO | None) -> Iterator[str]:
    """Yield a line for each prompt length: TFLOP/s of each backend."""
    yield "\nprefill of one prompt, causal: TFLOP/s"
    for heads in HEADS:
        for length in PROMPTS:
            row = f"{heads[0]}/{heads[1]} heads, {length} tokens:"
            for size in (0, 16):
                for name, backend in make_backends(size or 256).items():
                    us = prefill_us(backend, heads, length, size)
                    rate = 2 * length**2 * heads[0] * HEAD_DIM / us / 1e6
                    row += f"  {name}{'/' + str(size) if size else ''} {rate:.0f}"
                    _note(sink, "prefill", backend=name, us=us, heads=heads, length=length, block_size=size)
            yield row


def _note(sink: TextIO | None, kind: str, **fields: object) -> None:
    if sink is not None:
        sink.write(json.dumps({"kind": kind, **fields}) + "\n")
        sink.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Times the attention backends on one GPU.")
    parser.add_argument("--json-lines", type=argparse.FileType("w"), help="also write one object a figure")
    parser.add_argument("--limit-s", type=float, default=80.0, help="stop the decode table after that long")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device found; this times GPU kernels")
        return 2
    deadline_s = time.monotonic() + options.limit_s
    rate = copy_tb_per_s()
    _note(options.json_lines, "copy", tb_per_s=rate)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate:.2f} TB/s (read + write)")
    make_backends(256, tell=True)
    for line in prefill_lines(options.json_lines):
        print(line, flush=True)
    for line in decode_lines(Pool(), deadline_s, options.json_lines):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
