"""Times the kernels of tprt/kernels on one GPU, inside CUDA graphs, beside plain torch and cuBLAS.

Usage: bench_kernels.py [--rows 1,8,64,256] [--limit-s SECONDS]

One line for each kernel and shape: microseconds by kernel and by plain torch, what the least traffic of memory
takes at the bandwidth of a copy (measured first), and how much of that bandwidth the kernel reaches. A graph
holds so many launches, each on tensors of its own, that they exceed the L2 cache. Products without a line are
left to cuBLAS. Knows nothing of whole models, and of how tiles are chosen (`sweep_gemv.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tprt import kernels
from tprt.distributed import TPGroup
from tprt.kernels.gated_gemv import can_multiply_gated, multiply_gated
from tprt.kernels.gemv import can_multiply, multiply_rows
from tprt.kernels.preparation import HeadNorms, Preparation
from tprt.kernels.qk_rotary import prepare_attention
from tprt.layers.activation import SiluAndMul
from tprt.layers.norm import RMSNorm
from tprt.layers.rotary import RotaryEmbedding
from tprt.layers.sampler import Sampler, SamplingBatch
from tprt.sharding import Range

DTYPE = torch.bfloat16
VOCAB, HEAD_DIM = 151936, 128
_SPAN_BYTES = 128 << 20
_MAX_LAUNCHES = 48
_REPLAYS = 11


@dataclass(frozen=True)
class Model:
    """The shapes of a model."""

    name: str
    hidden: int
    channels: int
    heads: int
    kv_heads: int

    def products(self) -> dict[str, tuple[int, int]]:
        """Return the weights by name, `[out, in]`."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * HEAD_DIM, self.hidden),
            "o": (self.hidden, self.heads * HEAD_DIM),
            "gate_up": (2 * self.channels, self.hidden),
            "down": (self.hidden, self.channels),
            "lm_head": (VOCAB, self.hidden),
        }


MODELS = (Model("0.6B", 1024, 3072, 16, 8), Model("8B", 4096, 12288, 32, 8))
Launch = Callable[[int], object]
"""Launches what is timed on the tensors of the given number."""


@dataclass(frozen=True)
class Case:
    """One line: `num_bytes` are those of one launch, of which there are `copies`."""

    name: str
    num_bytes: int
    copies: int
    by_kernel: Launch
    by_torch: Launch


def copies_of(num_bytes: int) -> int:
    """Return how many launches of so many bytes exceed the L2 cache, within reason."""
    return max(2, min(_MAX_LAUNCHES, _SPAN_BYTES // num_bytes + 1))


def launch_us(launch: Launch, copies: int) -> float:
    """Return microseconds per launch, the median of replays of one graph; NaN where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        launch(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for index in range(copies):
                launch(index)
    except RuntimeError as error:
        print(f"not captured: {error}")
        return float("nan")
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in pairwise(events)]
    return 1000 * statistics.median(times) / copies


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / launch_us(lambda _: target.copy_(source), 2) * 1e6


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda").div_(8)


def plainly(launch: Launch) -> Launch:
    def without(index: int) -> object:
        with patch.object(kernels, "can_use", lambda tensor: False):
            return launch(index)

    return without


def norm_case(rows: int, model: Model) -> Case:
    num_bytes = 4 * rows * model.hidden * DTYPE.itemsize
    copies = copies_of(num_bytes)
    norm = RMSNorm(model.hidden, 1e-6).to("cuda", DTYPE)
    x, residuals = rand(rows, model.hidden), rand(copies, rows, model.hidden)

    def launch(index: int) -> object:
        return norm.add_forward(x, residuals[index])

    return Case("add + norm", num_bytes, copies, launch, plainly(launch))


def silu_case(rows: int, model: Model) -> Case:
    num_bytes = 3 * rows * model.channels * DTYPE.itemsize
    copies = copies_of(num_bytes)
    gate_ups, layer = rand(copies, rows, 2 * model.channels), SiluAndMul()

    def launch(index: int) -> object:
        return layer(gate_ups[index])

    return Case("silu * up", num_bytes, copies, launch, plainly(launch))


def attention_case(rows: int, model: Model) -> Case:
    heads = model.heads + 2 * model.kv_heads
    num_bytes = 2 * rows * heads * HEAD_DIM * DTYPE.itemsize
    copies = copies_of(num_bytes)
    qkvs, cache = rand(copies, rows, heads, HEAD_DIM), rand(2, rows, 16, model.kv_heads, HEAD_DIM)
    norms = [RMSNorm(HEAD_DIM, 1e-6).to("cuda", DTYPE) for _ in range(2)]
    with torch.device("cuda"):
        rotation = RotaryEmbedding(HEAD_DIM, 4096, 1e6)(torch.arange(rows))
        slots = torch.arange(rows) * 16
    weights = HeadNorms(norms[0].weight, norms[1].weight, 1e-6)
    how = Preparation(rotation.cos, rotation.signed_sin, rotation.positions, weights)
    counts = (model.heads, model.kv_heads)

    def by_kernel(index: int) -> object:
        return prepare_attention(qkvs[index], counts, how, (cache, slots), keep_keys=False)

    def by_torch(index: int) -> object:
        query, key, value = torch.split(qkvs[index], [*counts, model.kv_heads], dim=1)
        rotated = rotation.apply(torch.cat([norms[0](query), norms[1](key)], dim=1))
        cache[0].flatten(0, 1).index_copy_(0, slots, rotated[:, model.heads :])
        return cache[1].flatten(0, 1).index_copy_(0, slots, value)

    return Case("norm, rotate, KV", num_bytes, copies, by_kernel, plainly(by_torch))


def sampling_batch(rows: int, temperature: float, top_k: int, top_p: float) -> SamplingBatch:
    with torch.device("cuda"):
        return SamplingBatch(
            temperatures=torch.full((rows,), temperature),
            top_ks=torch.full((rows,), top_k),
            top_ps=torch.full((rows,), top_p),
            min_ps=torch.zeros(rows),
            noise_keys=torch.randint(0, 1 << 62, (rows,)),
            num_top=None,
            any_random=temperature > 0,
            any_truncated=top_k > 0 or top_p < 1,
        )


def sampling_cases(rows: int) -> Iterator[Case]:
    num_bytes, sampler = rows * VOCAB * DTYPE.itemsize, Sampler(TPGroup(0, 1), [Range(0, VOCAB)])
    copies = copies_of(num_bytes)
    logits = rand(copies, rows, VOCAB) * 16
    for name, parameters in (
        ("greedy", (0.0, 0, 1.0)),
        ("temperature", (0.6, 0, 1.0)),
        ("top-k 50", (0.6, 50, 1.0)),
        ("top-p 0.9", (0.6, 0, 0.9)),
    ):
        batch = sampling_batch(rows, *parameters)

        def launch(index: int, batch: SamplingBatch = batch) -> object:
            return sampler(logits[index], batch)

        yield Case(name, num_bytes, copies, launch, plainly(launch))


def product_case(name: str, rows: int, shape: tuple[int, int]) -> Case | None:
    """A product of few rows with a weight; None where cuBLAS does it anyway."""
    columns, inputs = shape
    num_bytes = (columns * inputs + rows * (columns + inputs)) * DTYPE.itemsize
    copies = copies_of(num_bytes)
    x = rand(rows, inputs)
    if not can_multiply(x, torch.empty(shape, dtype=DTYPE, device="cuda")):
        return None
    weights = rand(copies, columns, inputs)
    return Case(
        f"{name} {columns}x{inputs}",
        num_bytes,
        copies,
        lambda index: multiply_rows(x, weights[index]),
        lambda index: functional.linear(x, weights[index]),
    )


def gated_case(rows: int, model: Model) -> Case | None:
    columns, inputs = model.products()["gate_up"]
    num_bytes = (columns * inputs + rows * (columns // 2 + inputs)) * DTYPE.itemsize
    copies = copies_of(num_bytes)
    x, weights, layer = rand(rows, inputs), rand(copies, columns, inputs), SiluAndMul()
    if not can_multiply_gated(x, weights[0]):
        return None
    return Case(
        "gate_up + silu * up",
        num_bytes,
        copies,
        lambda index: multiply_gated(x, weights[index]),
        plainly(lambda index: layer(functional.linear(x, weights[index]))),
    )


def cases(rows: int, model: Model) -> Iterator[Case]:
    yield norm_case(rows, model)
    yield attention_case(rows, model)
    yield silu_case(rows, model)
    if model is MODELS[0]:
        yield from sampling_cases(rows)
    products = (product_case(name, rows, shape) for name, shape in model.products().items())
    yield from (case for case in (gated_case(rows, model), *products) if case is not None)


def line(model: Model, rows: int, case: Case, bandwidth: float) -> str:
    ours, theirs = (launch_us(launch, case.copies) for launch in (case.by_kernel, case.by_torch))
    least = case.num_bytes / bandwidth * 1e6
    share = 100 * least / ours
    return f"{model.name:5}{rows:4}  {case.name:22}{ours:9.1f}{theirs:9.1f}{least:9.1f}{share:7.0f} %"


def main(arguments: Sequence[str]) -> int:
    """Print the table; return 1 if the time was up before its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--limit-s", type=float, default=90.0)
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    deadline = time.monotonic() + options.limit_s
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print("model rows kernel                      us    torch    least   of copy", flush=True)
    for rows, model in product([int(rows) for rows in options.rows.split(",")], MODELS):
        for case in cases(rows, model):
            print(line(model, rows, case, bandwidth), flush=True)
            if time.monotonic() > deadline:
                print(f"stopped after {options.limit_s:g} s; --limit-s gives it more")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
