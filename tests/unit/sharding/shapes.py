"""Shapes of models that exist, and a strategy for shapes of models that might."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tprt.sharding import ModelShape, legal_world_sizes

SMOLLM2_135M = ModelShape(576, 1536, 30, 9, 3, 64, 49152, True)
QWEN2_5_0_5B = ModelShape(896, 4864, 24, 14, 2, 64, 151936, True)
QWEN3_8B = ModelShape(4096, 12288, 36, 32, 8, 128, 151936, False)
LLAMA_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128256, False)

KNOWN = [
    *((SMOLLM2_135M, world_size) for world_size in range(1, 10)),
    *((QWEN2_5_0_5B, world_size) for world_size in range(1, 15)),
    *((QWEN3_8B, world_size) for world_size in range(1, 9)),
    *((LLAMA_70B, world_size) for world_size in (3, 5, 6, 7, 8)),
]


@dataclass(frozen=True)
class Case:
    """The arguments of `make_shard_plan`."""

    shape: ModelShape
    world_size: int
    rank_weights: tuple[float, ...] | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a shape, a world size that is legal for it and, often, unequal weights."""
    kv_heads = draw(st.integers(1, 8))
    shape = ModelShape(
        hidden_size=draw(st.integers(1, 1024)),
        intermediate_size=draw(st.integers(1, 4096)),
        num_hidden_layers=draw(st.integers(1, 40)),
        num_attention_heads=kv_heads * draw(st.integers(1, 8)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 64, 128])),
        vocab_size=draw(st.integers(1, 40000)),
        tie_word_embeddings=draw(st.booleans()),
    )
    world_size = draw(st.sampled_from(legal_world_sizes(shape)[:12]))
    weights = st.lists(st.floats(0.1, 200.0), min_size=world_size, max_size=world_size).map(tuple)
    return Case(shape, world_size, draw(st.none() | weights))
