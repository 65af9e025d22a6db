"""Every attention backend that works on this GPU attends exactly, eager and captured, alone and in a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch import LLM, SamplingParams
from tests.support.checkpoints import TinyModel, reference_logits, reference_tokens, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tests.support.paged_attention import PagedBatch, Shape
from tests.support.prepared_decodes import PreparedDecodes
from tprt.attention import AttentionBackend, AttentionSetup, make_attention_backend
from tprt.config import Config
from tprt.context import Context
from tprt.errors import ConfigError

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    Shape(BF16, head_dim=64, block_size=16, group=1, device="cuda"),
    Shape(BF16, head_dim=128, block_size=16, group=2, device="cuda"),
    Shape(BF16, head_dim=128, block_size=256, group=8, kv_heads=1, device="cuda"),
    Shape(BF16, head_dim=80, block_size=16, group=3, device="cuda"),
    Shape(BF16, head_dim=256, block_size=256, group=2, device="cuda"),
    Shape(FP16, head_dim=64, block_size=256, group=3, device="cuda"),
    Shape(FP16, head_dim=128, block_size=1, group=8, device="cuda"),
    Shape(FP32, head_dim=64, block_size=16, group=3, device="cuda"),
    Shape(FP32, head_dim=128, block_size=256, group=2, device="cuda"),
    Shape(FP32, head_dim=80, block_size=4, group=1, kv_heads=3, device="cuda"),
]
PACKAGES = ["flash_attn_3", "flash_attn", "triton"]
DECODES = [0, 14, 15, 16, 299, 4096]


def make_backend(name: str, shape: Shape) -> AttentionBackend:
    """Make the backend; where it does not work, skip with its own words. Triton must always work."""
    setup = AttentionSetup(torch.device("cuda"), shape.dtype, shape.head_dim, shape.block_size)
    try:
        return make_attention_backend(name, shape.head_dim**-0.5, setup)
    except ConfigError as error:
        if name == "triton":
            raise
        pytest.skip(str(error))


@pytest.fixture(params=[(name, shape) for shape in SHAPES for name in PACKAGES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[AttentionBackend, Shape]:
    name, shape = request.param
    return make_backend(name, shape), shape


def test_decodes_of_any_length(case: tuple[AttentionBackend, Shape]) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached=DECODES, new=[1] * len(DECODES))
    batch.check(batch.run(backend, num_decodes=len(DECODES)))
    alone = PagedBatch(shape, cached=[1023], new=[1])
    alone.check(alone.run(backend, num_decodes=1))


@pytest.mark.parametrize("has_norms", [True, False], ids=["norms", "plain"])
@pytest.mark.parametrize("cached", [DECODES, [(37 * row) % 500 for row in range(300)]], ids=["few", "many"])
def test_heads_that_the_decode_itself_prepares(
    case: tuple[AttentionBackend, Shape], cached: list[int], has_norms: bool
) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached, new=[1] * len(cached))
    assert backend.prepares(8, batch.cache) == (backend.name != "flash_attn")
    if backend.prepares(8, batch.cache):
        PreparedDecodes(batch, has_norms).check(backend)


def test_prompts_from_their_own_tokens(case: tuple[AttentionBackend, Shape]) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached=[0] * 4, new=[300, 1, 64, 129])
    batch.check(batch.run(backend, num_decodes=0, with_tables=False))


def test_chunks_after_what_is_cached(case: tuple[AttentionBackend, Shape]) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached=[1000, 0, 17, 64], new=[130, 200, 1, 64])
    batch.check(batch.run(backend, num_decodes=0))


def test_decodes_and_chunks_in_one_batch(case: tuple[AttentionBackend, Shape]) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached=[4096, 15, 300, 0, 33], new=[1, 1, 1, 257, 40])
    batch.check(batch.run(backend, num_decodes=3))


@pytest.mark.parametrize("name", PACKAGES)
def test_many_decodes(name: str) -> None:
    shape = Shape(BF16, head_dim=128, block_size=256, group=2, kv_heads=8, device="cuda")
    backend = make_backend(name, shape)
    batch = PagedBatch(shape, cached=[(37 * index) % 500 for index in range(100)], new=[1] * 100)
    batch.check(batch.run(backend, num_decodes=100))


def test_plain_torch_attends_exactly_in_float32() -> None:
    shape = Shape(FP32, head_dim=64, block_size=16, group=3, device="cuda")
    backend = make_attention_backend("sdpa", shape.head_dim**-0.5)
    for cached, new, num_decodes in (([0, 40], [1, 1], 2), ([300, 7, 0], [1, 50, 20], 1)):
        batch = PagedBatch(shape, cached, new)
        batch.check(batch.run(backend, num_decodes))


def test_a_slot_of_minus_one_is_not_written(case: tuple[AttentionBackend, Shape]) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached=[20], new=[3])
    batch.write(backend)
    before = batch.cache.clone()
    slots = torch.tensor([-1, int(batch.slots(0, 4, 5)), -1], device="cuda")
    backend.write_kv(batch.keys[0][:3], batch.values[0][:3], batch.cache, slots)
    changed = (batch.cache != before).flatten(3).any(-1).any(0).flatten().nonzero().flatten()
    assert changed.tolist() == [int(slots[1])]


class Captured:
    """A CUDA graph of `write_kv` and `decode` over buffers that keep their place."""

    def __init__(self, backend: AttentionBackend, batch: PagedBatch) -> None:
        context = batch.context(len(batch.new))
        assert context.context_lens is not None
        self.backend, self.cache = backend, batch.cache
        self.query = torch.cat(batch.queries)
        self.key, self.value = self._newest(batch)
        self.context = Context(
            slot_mapping=batch.newest_slots(),
            context_lens=context.context_lens.clone(),
            block_tables=batch.tables.clone(),
            max_seqlen_k=context.max_seqlen_k,
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self._step()

    @staticmethod
    def _newest(batch: PagedBatch) -> tuple[Tensor, Tensor]:
        return torch.stack([rows[-1] for rows in batch.keys]), torch.stack([rows[-1] for rows in batch.values])

    def _step(self) -> Tensor:
        assert self.context.slot_mapping is not None
        self.backend.write_kv(self.key, self.value, self.cache, self.context.slot_mapping)
        return self.backend.decode(self.query, self.cache, self.context)

    def fill(self, batch: PagedBatch) -> None:
        """Put another batch of as many sequences, with tables no wider, into the buffers."""
        assert self.context.slot_mapping is not None
        assert self.context.context_lens is not None
        assert self.context.block_tables is not None
        self.query.copy_(torch.cat(batch.queries))
        for buffer, rows in zip((self.key, self.value), self._newest(batch), strict=True):
            buffer.copy_(rows)
        self.context.slot_mapping.copy_(batch.newest_slots())
        self.context.context_lens.copy_(torch.tensor(batch.lens))
        self.context.block_tables.zero_()
        self.context.block_tables[:, : batch.tables.shape[1]] = batch.tables
        self.cache[:, : batch.cache.shape[1]] = batch.cache
        # The newest tokens are for the graph to write.
        self.cache.flatten(1, 2)[:, self.context.slot_mapping] = 1e4

    def replay(self) -> Tensor:
        self.output.fill_(float("nan"))
        self.graph.replay()
        return self.output.clone()


def test_a_captured_decode_gives_the_bits_of_an_eager_one(case: tuple[AttentionBackend, Shape]) -> None:
    backend, shape = case
    first = PagedBatch(shape, cached=[4096, 40, 300, 17], new=[1] * 4)
    first.write(backend)
    captured = Captured(backend, first)
    first.check(captured.replay())
    assert captured.replay().equal(captured._step())
    # Other lengths in the same buffers: nothing of the first batch was captured.
    second = PagedBatch(shape, cached=[3, 999, 0, 15], new=[1] * 4, seed=1)
    second.write(backend)
    captured.fill(second)
    result = captured.replay()
    second.check(result)
    assert result.equal(captured._step())


def test_padding_of_a_captured_decode_leaves_the_sequences_as_they_are(
    case: tuple[AttentionBackend, Shape],
) -> None:
    backend, shape = case
    batch = PagedBatch(shape, cached=[200, 40, 9, 9], new=[1] * 4)
    batch.write(backend)
    captured = Captured(backend, batch)
    expected, before = captured.replay(), batch.cache.clone()
    assert captured.context.slot_mapping is not None
    assert captured.context.context_lens is not None
    captured.key[2:] = captured.value[2:] = 7.0
    captured.context.slot_mapping[2:] = -1
    captured.context.context_lens[2:] = 0
    result = captured.replay()
    assert result[:2].equal(expected[:2])
    assert result.isfinite().all()
    assert batch.cache.equal(before)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13] * 4, [42], [150, 3, 99, 120, 7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
MODELS = [TinyModel("llama", 9, 3, bias=True), TinyModel("qwen3", 8, 2, tied=True)]


def config_of(
    folder: Path, backend: str, dtype: str, max_num_batched_tokens: int = 64, enforce_eager: bool = True
) -> Config:
    """Return settings with blocks that suit every backend; eager, so that logits can be looked at."""
    config = make_config(folder, block_size=256, max_num_batched_tokens=max_num_batched_tokens, device="cuda")
    changes = {"attention_backend": backend, "enforce_eager": enforce_eager}
    return config.model_copy(
        update={
            "runtime": config.runtime.model_copy(update=changes),
            "model": config.model.model_copy(update={"dtype": dtype}),
        }
    )


def engine_of(config: Config) -> LocalEngine:
    """Make an engine; where its backend does not work, skip with its own words. Triton must always work."""
    name = config.runtime.attention_backend
    try:
        engine = LocalEngine(config)
    except ConfigError as error:
        if name in ("triton", "sdpa"):
            raise
        pytest.skip(str(error))
    for layer in engine.runners[0].model.model.layers:
        assert layer.self_attn.attn._backend.name == name
    return engine


@pytest.mark.parametrize("tiny", MODELS, ids=str)
@pytest.mark.parametrize("name", ["triton", "sdpa"])
@pytest.mark.parametrize("max_num_batched_tokens", [64, 8])
def test_a_model_in_float32_gives_the_tokens_of_transformers(
    tmp_path: Path, tiny: TinyModel, name: str, max_num_batched_tokens: int
) -> None:
    model = save_tiny(tmp_path, tiny).cuda()
    with engine_of(config_of(tmp_path, name, "float32", max_num_batched_tokens)) as engine:
        tokens = engine.generate(PROMPTS, GREEDY)
    assert tokens == [reference_tokens(model, prompt, 8) for prompt in PROMPTS]


def test_a_deployment_that_may_capture_its_decodes_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, MODELS[0]).cuda()
    with LLM(config_of(tmp_path, "triton", "float32", enforce_eager=False)) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [
        reference_tokens(model, prompt, 8) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("tiny", MODELS, ids=str)
@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("max_num_batched_tokens", [64, 8])
def test_a_model_in_bfloat16_is_no_further_off_than_with_plain_torch(
    tmp_path: Path, tiny: TinyModel, name: str, max_num_batched_tokens: int
) -> None:
    model = save_tiny(tmp_path, tiny).bfloat16().float().cuda()
    errors = {}
    for backend in (name, "sdpa"):
        with engine_of(config_of(tmp_path, backend, "bfloat16", max_num_batched_tokens)) as engine:
            tokens = engine.generate(PROMPTS, GREEDY)
            differences = []
            for index, prompt in enumerate(PROMPTS):
                expected = reference_logits(model, prompt + tokens[index])[len(prompt) - 1 : -1]
                differences.append(torch.stack(engine.logits[index]).float() - expected)
            errors[backend] = float(torch.cat(differences).square().mean().sqrt())
    assert errors[name] < 2 * errors["sdpa"], errors


def test_auto_takes_a_backend_with_kernels_of_its_own_for_every_type() -> None:
    for dtype in (BF16, FP16, FP32):
        setup = AttentionSetup(torch.device("cuda"), dtype, head_dim=64, block_size=16)
        assert make_attention_backend("auto", 1.0, setup).name in PACKAGES
