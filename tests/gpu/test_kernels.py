"""Every Triton kernel gives what the plain torch code of its layer gives, on a GPU, eager and captured.

With `TRITON_INTERPRET=1` in the environment Triton's interpreter runs them on a CPU instead, all but graphs:

    TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from launch import SamplingParams
from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt import kernels
from tprt.distributed import TPGroup
from tprt.layers.activation import SiluAndMul
from tprt.layers.embedding import VocabParallelEmbedding
from tprt.layers.noise import gumbel_noise, noise_keys
from tprt.layers.norm import RMSNorm
from tprt.layers.packed_weight import multiply_plain
from tprt.layers.rotary import RotaryEmbedding
from tprt.layers.sampler import Sampler, SamplingBatch, _candidates
from tprt.sharding import Range

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
needs_graphs = pytest.mark.skipif(INTERPRETED, reason="there are no CUDA graphs in Triton's interpreter")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The interpreter cuts numbers off where they should be rounded to bfloat16.
DTYPES = [FP16, FP32] if INTERPRETED else [BF16, FP16, FP32]
# A last bit that two roundings lose; float32 has sums in another order besides.
ROUNDINGS = {BF16: 2.1, FP16: 2.1, FP32: 32.0}


@contextmanager
def by_kernels(wanted: bool) -> Iterator[None]:
    with patch.object(kernels, "can_use", lambda tensor: wanted):
        yield


def both(compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the kernel computes and what plain torch does."""
    with by_kernels(True):
        by_kernel = compute()
    with by_kernels(False):
        return by_kernel, compute()


def rand(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor, scale: Tensor | float | None = None) -> None:
    """Compare within the roundings of the type, of `scale` (the expected values, if not given)."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    size = expected.double().abs() if scale is None else scale
    bound = torch.finfo(found.dtype).eps * ROUNDINGS[found.dtype] * size + torch.finfo(found.dtype).tiny
    error = ((found.double() - expected.double()).abs() / bound).nan_to_num(nan=torch.inf)
    if error.numel() and error.max() > 1:
        at = int(error.argmax())
        pytest.fail(
            f"{int((error > 1).sum())} of {error.numel()} are off; number {at} by {float(error.max()):.3g}"
            f" times the bound: found {float(found.flatten()[at])}, expected {float(expected.flatten()[at])}"
        )


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph, output


# Norm, activation, embedding.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (2, 576), (5, 1000), (3, 4096), (2, 16384), (4, 3, 80)], ids=str
)
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], 1e-6).to(DEVICE, dtype)
    norm.weight.data = rand(shape[-1], dtype=dtype, seed=1)
    x, residual = rand(*shape, dtype=dtype, seed=2), 3 * rand(*shape, dtype=dtype, seed=3)
    assert_close(*both(lambda: norm(x)))
    sums = []

    def add() -> Tensor:
        normed, total = norm.add_forward(x, residual.clone())
        sums.append(total)
        return normed

    assert_close(*both(add))
    assert sums[0].equal(sums[1])
    assert sums[0].equal(residual + x)


def test_a_row_too_long_for_a_kernel_is_normalised_nevertheless() -> None:
    norm = RMSNorm(20000, 1e-6).to(DEVICE)
    norm.weight.data = rand(20000)
    assert_close(*both(lambda: norm(rand(2, 20000, seed=1))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (70, 1536), (2, 6144), (5, 2050)], ids=str)
def test_silu_and_mul(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = 4 * rand(*shape, dtype=dtype)
    gate_up[0, 0] = 90.0
    gate_up[-1, -1] = -90.0
    assert_close(*both(lambda: SiluAndMul()(gate_up)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 80, 1025, 4096])
def test_embedding_of_a_part_of_the_vocabulary(dtype: torch.dtype, size: int) -> None:
    class Alone:
        def all_reduce(self, tensor: Tensor) -> Tensor:
            return tensor

    embedding = VocabParallelEmbedding(50, size, Range(13, 31), TPGroup(0, 2, Alone()))  # type: ignore[arg-type]
    embedding.weight.data = rand(18, size, dtype=dtype)
    found, expected = both(lambda: embedding(torch.arange(50, device=DEVICE)))
    assert found.equal(expected)
    assert found[13:31].equal(embedding.weight)
    assert not found[:13].any()


# Between the QKV projection and attention.

HEADS = [(16, 8, 128), (9, 3, 64), (3, 1, 80), (5, 1, 8), (4, 4, 256), (8, 4, 96)]


class Attending:
    """The inputs of `prepare_attention`; slots in any order, every third token without one."""

    def __init__(self, heads: tuple[int, int, int], tokens: int, dtype: torch.dtype, has_norms: bool) -> None:
        from tprt.kernels.preparation import HeadNorms

        self.num_q, self.num_kv, size = heads
        self.qkv = rand(tokens, self.num_q + 2 * self.num_kv, size, dtype=dtype)
        self.cache = torch.full((2, tokens + 3, 4, self.num_kv, size), 9.0, dtype=dtype, device=DEVICE)
        order = torch.randperm(4 * (tokens + 3), generator=torch.Generator().manual_seed(1))
        self.slots = order[:tokens].to(DEVICE)
        self.slots[1::3] = -1
        rotary = RotaryEmbedding(size, 300, 10000.0)
        rotary._cos, rotary._signed_sin = rotary._cos.to(DEVICE), rotary._signed_sin.to(DEVICE)
        self.rotation = rotary((torch.arange(tokens, device=DEVICE) * 37) % 300)
        self.weights = [rand(size, dtype=dtype, seed=seed) for seed in (2, 3)]
        self.norms = HeadNorms(self.weights[0], self.weights[1], 1e-6) if has_norms else None

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and the cache by the layers, in plain torch."""
        size = self.qkv.shape[2]
        parts = list(self.qkv.split([self.num_q, self.num_kv, self.num_kv], dim=1))
        with by_kernels(False):
            for index in range(2):
                if self.norms is not None:
                    norm = RMSNorm(size, self.norms.eps).to(DEVICE, self.qkv.dtype)
                    norm.weight.data = self.weights[index]
                    parts[index] = norm(parts[index])
                parts[index] = self.rotation.apply(parts[index])
        cache, real = self.cache.clone(), self.slots >= 0
        for index in range(2):
            cache[index].flatten(0, 1)[self.slots[real]] = parts[index + 1][real]
        return parts[0], parts[1], cache

    def found(self, keep_keys: bool = True, writes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        from tprt.kernels.preparation import Preparation
        from tprt.kernels.qk_rotary import prepare_attention

        rotation = self.rotation
        return prepare_attention(
            self.qkv,
            (self.num_q, self.num_kv),
            Preparation(rotation.cos, rotation.signed_sin, rotation.positions, self.norms),
            (self.cache, self.slots) if writes else None,
            keep_keys,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("has_norms", [True, False], ids=["norms", "plain"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_norm_rotation_and_kv_write(
    heads: tuple[int, int, int], tokens: int, dtype: torch.dtype, has_norms: bool
) -> None:
    case = Attending(heads, tokens, dtype, has_norms)
    query, key, cache = case.expected()
    values = case.qkv[:, case.num_q + case.num_kv :].clone()
    found = case.found()
    # A coordinate is a sum of two products that may cancel.
    assert_close(found[0], query, scale=2 * float(query.abs().max()))
    assert_close(found[1], key, scale=2 * float(key.abs().max()))
    assert found[2].equal(values)
    real = cache != 9.0
    assert real.any(-1).sum() == 2 * case.num_kv * int((case.slots >= 0).sum())
    assert (case.cache[~real] == 9.0).all()
    assert_close(case.cache, cache, scale=2 * float(key.abs().max()))


def test_keys_stay_as_they_are_where_nobody_reads_them_and_nothing_is_stored_without_slots() -> None:
    case = Attending(HEADS[0], 3, FP32, has_norms=True)
    before, cache = case.qkv.clone(), case.cache.clone()
    query = case.found(keep_keys=False, writes=False)[0]
    assert case.qkv.equal(before)
    assert case.cache.equal(cache)
    assert_close(query, case.expected()[0], scale=2 * float(query.abs().max()))


# The begin of a captured decode.


@pytest.mark.parametrize(("num_seqs", "width"), [(1, 1), (5, 40), (64, 128), (300, 700)])
def test_a_decode_begins_with_the_tokens_and_the_changed_tables_of_its_slots(num_seqs: int, width: int) -> None:
    from tprt.kernels.begin_decode import begin_decode

    generator, num_slots = torch.Generator().manual_seed(num_seqs), num_seqs + 7

    def numbers(limit: int, *size: int) -> Tensor:
        return torch.randint(limit, size, generator=generator)

    # The last three are padding: all of one slot.
    slots = torch.randperm(num_slots, generator=generator)[:num_seqs]
    slots[-3:] = slots[-1]
    tables, last = numbers(1000, num_slots, width).int(), numbers(500, num_slots)
    token_ids = numbers(500, num_seqs)
    token_ids[::2] = -1
    places = (slots * width + numbers(width, num_seqs)).unique()
    values = numbers(1000, len(places)).int()
    changed = tables.clone()
    changed.view(-1)[places] = values
    expected = torch.where(token_ids < 0, last[slots], token_ids), changed[slots]
    tables = tables.to(DEVICE)
    found = begin_decode(
        *(given.to(DEVICE) for given in (token_ids, last, slots)),
        tables,
        (places.to(DEVICE), values.to(DEVICE)),
    )
    assert found[0].cpu().equal(expected[0])
    assert found[1].cpu().equal(expected[1])
    assert tables.cpu().equal(changed)


# Sampling.


def batch_of(
    temperatures: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingBatch:
    n = len(temperatures)
    keys = noise_keys(np.arange(n, dtype=np.int64), np.full(n, 9, np.int32))
    return SamplingBatch(
        temperatures=torch.tensor(temperatures, device=DEVICE),
        top_ks=torch.full((n,), top_k, device=DEVICE),
        top_ps=torch.full((n,), top_p, device=DEVICE),
        min_ps=torch.full((n,), min_p, device=DEVICE),
        noise_keys=torch.from_numpy(keys).to(DEVICE),
        num_top=None,
        any_random=any(temperatures),
        any_truncated=top_k > 0 or top_p < 1 or min_p > 0,
    )


def on_cpu(batch: SamplingBatch) -> SamplingBatch:
    tensors = ("temperatures", "top_ks", "top_ps", "min_ps", "noise_keys")
    others = {name: getattr(batch, name) for name in ("num_top", "any_random", "any_truncated")}
    return SamplingBatch(**{name: getattr(batch, name).cpu() for name in tensors}, **others)


MIXED = [0.0, 0.6, 1.0, 1.5, 0.0, 0.01]


def test_noise_has_the_same_bits_on_a_cpu_and_here() -> None:
    keys = torch.from_numpy(noise_keys(np.arange(9, dtype=np.int64), np.arange(9, dtype=np.int32)))
    assert gumbel_noise(keys.to(DEVICE), 5, 20_000).cpu().equal(gumbel_noise(keys, 5, 20_000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 1024, 5001])
@pytest.mark.parametrize("temperatures", [[0.0] * 3, MIXED], ids=["greedy", "mixed"])
def test_candidates_are_those_of_a_cpu_bit_by_bit(
    dtype: torch.dtype, vocab: int, temperatures: list[float]
) -> None:
    batch, logits = batch_of(temperatures), 3 * rand(len(temperatures), vocab, dtype=dtype)
    with by_kernels(True):
        found = _candidates(logits, batch, 700)
        tokens = Sampler(TPGroup(0, 1), [Range(0, vocab)])(logits, batch).token_ids
    with by_kernels(False):
        expected = _candidates(logits.cpu().float(), on_cpu(batch), 700)
        plain = Sampler(TPGroup(0, 1), [Range(0, vocab)])(logits, batch).token_ids
    assert found.cpu().equal(expected)
    assert tokens.dtype == torch.int64
    assert tokens.equal(plain)


def test_the_lowest_token_wins_a_tie_and_a_row_of_nan_still_gives_a_token() -> None:
    logits = torch.zeros(3, 4000, device=DEVICE, dtype=BF16)
    logits[1, [3000, 1500]] = 2.0
    logits[2] = float("nan")
    with by_kernels(True):
        tokens = Sampler(TPGroup(0, 1), [Range(0, 4000)])(logits, batch_of([0.0] * 3)).token_ids.tolist()
    assert tokens[:2] == [0, 1500]
    assert 0 <= tokens[2] < 4000


LIMITS = [
    *[{"top_k": 1}, {"top_k": 40}, {"top_k": 9000}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_p": 1e-9}],
    *[{"min_p": 0.05}, {"top_k": 50, "top_p": 0.8, "min_p": 0.01}, {"top_k": 3000, "top_p": 0.5}],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_truncation_keeps_what_a_sort_in_float64_keeps(dtype: torch.dtype, limits: dict[str, float]) -> None:
    from tprt.kernels.truncation import level_bits, truncation_floors

    batch, logits = batch_of(MIXED, **limits), 2 * rand(len(MIXED), 5001, dtype=dtype)  # type: ignore[arg-type]
    floors = truncation_floors(logits, batch.temperatures, batch.top_ks, batch.top_ps, batch.min_ps)
    kept = levels(logits, level_bits(dtype)) >= floors.unsqueeze(1)
    # Sums in float32 may put a token that is this close to a limit on either side.
    least, most = (kept_exactly(logits, batch, off) for off in (-1e-5, 1e-5))
    assert not (least & ~kept).any()
    assert not (kept & ~most)[batch.temperatures > 0].any()
    assert kept[batch.temperatures == 0].all()


def levels(logits: Tensor, bits: int) -> Tensor:
    raw = (logits.float() + 0.0).view(torch.int32).long()
    ordered = raw ^ ((raw >> 31) & 0x7FFFFFFF)
    return ((ordered & 0xFFFFFFFF) ^ 0x80000000) >> (32 - bits)


def kept_exactly(logits: Tensor, batch: SamplingBatch, off: float) -> Tensor:
    """Tell which tokens stay, with limits that are looser by `off`."""
    temperatures = batch.temperatures.where(batch.temperatures > 0, 1.0).double().unsqueeze(1)
    ordered, ids = (logits.double() / temperatures).sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    last = torch.where(batch.top_ks > 0, batch.top_ks.clamp(max=logits.shape[1]), logits.shape[1]) - 1
    kept = ordered >= ordered.gather(1, last.unsqueeze(1))
    kept &= probs >= batch.min_ps.unsqueeze(1) * (1 - off) * probs[:, :1]
    probs = probs * kept / (probs * kept).sum(-1, keepdim=True)
    top_ps = batch.top_ps.double().unsqueeze(1)
    kept &= (probs.cumsum(-1) - probs < top_ps + off) | (top_ps >= 1)
    kept[:, 0] = True
    floor = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, ids, ordered >= floor)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_truncated_draws_are_those_of_plain_torch(limits: dict[str, float]) -> None:
    batch = batch_of([0.7] * 20, **limits)  # type: ignore[arg-type]
    sampler, logits = Sampler(TPGroup(0, 1), [Range(0, 3000)]), 3 * rand(20, 3000, dtype=BF16)
    found, expected = both(lambda: sampler(logits, batch).token_ids)
    # One row in twenty may have a token on the very limit.
    assert (found != expected).sum() <= 1


# Multiplying a few rows.

WEIGHTS = [(1, 1), (37, 100), (64, 1024), (50, 1536), (576, 576), (1030, 2056), (96, 12288)]


@pytest.mark.parametrize("dtype", [FP16] if INTERPRETED else [BF16, FP16], ids=str)
@pytest.mark.parametrize("weight_shape", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("rows", "has_bias"), [(1, False), (2, True), (5, False), (16, True), (64, True), (65, False)]
)
def test_a_few_rows_times_a_weight(
    dtype: torch.dtype, weight_shape: tuple[int, int], rows: int, has_bias: bool
) -> None:
    columns, inputs = weight_shape
    wide, weight = rand(rows, inputs + 8, dtype=dtype), rand(columns, inputs, dtype=dtype, seed=1)
    bias = rand(columns, dtype=dtype, seed=2) if has_bias else None
    for x in (wide[:, :inputs].contiguous(), wide[:, :inputs]):
        with by_kernels(True):
            found = multiply_plain(x, weight, bias)
            again = multiply_plain(x, weight, bias)
        if rows > 64:  # that many are the library's business, which may round sums on the way
            assert found.equal(functional.linear(x, weight, bias))
            continue
        exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        sums = x.double().abs() @ weight.double().abs().T
        # The result is rounded once; sums in float32 are off by far less than that of the sum of sizes.
        bound = torch.finfo(dtype).eps * exact.abs() + 2e-6 * sums + 1e-7
        worst = float(((found.double() - exact).abs() / bound).max())
        assert worst <= 1, f"off by {worst:.3g} times the bound"
        assert found.equal(again)


@pytest.mark.parametrize("dtype", [FP16] if INTERPRETED else [BF16, FP16], ids=str)
@pytest.mark.parametrize("weight_shape", [(2, 1), (74, 100), (512, 576), (6144, 1024), (96, 12288)], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_gated_product_of_one_or_two_rows(
    dtype: torch.dtype, weight_shape: tuple[int, int], rows: int
) -> None:
    from tprt.kernels.gated_gemv import can_multiply_gated, multiply_gated

    columns, inputs = weight_shape
    wide, weight = rand(rows, inputs + 8, dtype=dtype), rand(columns, inputs, dtype=dtype, seed=1) / 8
    assert not can_multiply_gated(rand(3, inputs, dtype=dtype), weight)
    for x in (wide[:, :inputs].contiguous(), wide[:, :inputs]):
        assert can_multiply_gated(x, weight)
        gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        # Gate, activation, up and result are rounded; silu is at most 1.1 times as steep as its input.
        scale = expected.abs() + 1.1 * gate.abs() * up.abs() + 1e-3
        assert_close(multiply_gated(x, weight), expected.to(dtype), scale=scale)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_programs_that_share_a_sum_add_up_to_the_same_every_time(splits: int) -> None:
    from tprt.kernels.gemv import multiply_with
    from tprt.kernels.gemv_tiles import DotTile

    x, weight = rand(5, 4096, dtype=FP16), rand(80, 4096, dtype=FP16, seed=1)
    tile = DotTile(columns=16, inputs=128, splits=splits, num_warps=2, num_stages=3)
    results = [multiply_with(tile, x, weight, None) for _ in range(3 if INTERPRETED else 200)]
    torch.testing.assert_close(results[0].double(), x.double() @ weight.double().T, atol=0.3, rtol=2e-3)
    assert all(result.equal(results[0]) for result in results)


# Captured, and in a model.


@needs_graphs
@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_a_captured_step_gives_the_bits_of_an_eager_one(rows: int) -> None:
    case = Attending((16, 8, 128), rows, BF16, has_norms=True)
    norm = RMSNorm(1024, 1e-6).to(DEVICE, BF16)
    norm.weight.data = rand(1024, dtype=BF16)
    wide, head = rand(4096, 1024, dtype=BF16, seed=4) / 32, rand(5000, 1024, dtype=BF16, seed=5) / 8
    down = rand(1024, 2048, dtype=BF16, seed=7) / 32
    batch = batch_of(([0.0, 0.7] * rows)[:rows], top_k=50, top_p=0.9)
    x, start = rand(rows, 1024, dtype=BF16, seed=6), rand(rows, 1024, dtype=BF16, seed=8)
    sampler = Sampler(TPGroup(0, 1), [Range(0, 5000)])

    def step() -> Tensor:
        residual = start.clone()
        normed, residual = norm.add_forward(x, residual)
        case.qkv = multiply_plain(normed, wide).view(rows, 32, 128)
        query = case.found(keep_keys=False)[0]
        hidden = multiply_plain(query.flatten(1), down)
        hidden = multiply_plain(SiluAndMul()(torch.cat([hidden, normed], 1)), wide[:, :1024].contiguous())
        normed, residual = norm.add_forward(hidden[:, :1024].contiguous(), residual)
        return sampler(multiply_plain(normed, head), batch).token_ids

    graph, output = captured(step)
    for seed in (10, 11):
        x.copy_(rand(rows, 1024, dtype=BF16, seed=seed))
        batch.noise_keys.add_(12345)
        case.cache.zero_()
        expected, cache = step(), case.cache.clone()
        case.cache.zero_()
        output.fill_(-1)
        graph.replay()
        assert output.equal(expected)
        assert case.cache.equal(cache)
        assert cache.any()


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [150, 3, 99, 120, 7]]


@pytest.mark.parametrize(
    "tiny", [TinyModel("llama", 9, 3, bias=True), TinyModel("qwen3", 8, 2, tied=True)], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_gives_the_tokens_that_it_gives_without_kernels(
    tmp_path: Path, tiny: TinyModel, temperature: float
) -> None:
    save_tiny(tmp_path, tiny)
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=6, top_k=40, ignore_eos=True)
    tokens = []
    for wanted in (True, False):
        config = make_config(tmp_path, max_num_batched_tokens=8, device=DEVICE)
        with by_kernels(wanted), LocalEngine(config) as engine:
            tokens.append(engine.generate(PROMPTS, params))
    assert tokens[0] == tokens[1]
    assert len({tuple(row) for row in tokens[0]}) == len(PROMPTS)
