"""The Triton kernels attend exactly, run by Triton's interpreter on a CPU.

    TRITON_INTERPRET=1 python -m pytest tests/unit/attention/test_triton_interpreted.py

The interpreter does not multiply bfloat16; `tests/gpu`, where kernels are compiled, has that and more.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.paged_attention import PagedBatch, Shape
from tests.support.prepared_decodes import PreparedDecodes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)
pytest.importorskip("triton")

from tprt.attention.triton import TritonBackend

SHAPES = [
    Shape(head_dim=16, block_size=1, group=1, kv_heads=1),
    Shape(head_dim=64, block_size=16, group=3),
    Shape(head_dim=80, block_size=64, group=2, kv_heads=3),
    Shape(torch.float16, head_dim=128, block_size=16, group=2),
    Shape(torch.float16, head_dim=64, block_size=256, group=8, kv_heads=1),
]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    shape: Shape = request.param
    return shape


def backend_of(shape: Shape) -> TritonBackend:
    return TritonBackend(shape.head_dim**-0.5)


def test_decodes_of_any_length(shape: Shape) -> None:
    batch = PagedBatch(shape, cached=[0, 14, 15, 16, 299], new=[1] * 5)
    batch.check(batch.run(backend_of(shape), num_decodes=5))


def test_decodes_that_are_not_split() -> None:
    shape = Shape(head_dim=16, block_size=4)
    count = 512 // shape.kv_heads
    batch = PagedBatch(shape, cached=[index % 33 for index in range(count)], new=[1] * count)
    batch.check(batch.run(backend_of(shape), num_decodes=count))
    PreparedDecodes(batch, has_norms=True).check(backend_of(shape))


@pytest.mark.parametrize("has_norms", [True, False], ids=["norms", "plain"])
def test_heads_that_the_decode_itself_prepares(shape: Shape, has_norms: bool) -> None:
    batch = PagedBatch(shape, cached=[0, 14, 15, 16, 299], new=[1] * 5)
    PreparedDecodes(batch, has_norms).check(backend_of(shape))


def test_prompts_from_their_own_tokens(shape: Shape) -> None:
    batch = PagedBatch(shape, cached=[0, 0, 0], new=[70, 1, 130])
    batch.check(batch.run(backend_of(shape), num_decodes=0, with_tables=False))


def test_decodes_and_chunks_after_what_is_cached(shape: Shape) -> None:
    batch = PagedBatch(shape, cached=[40, 3, 100, 0, 5], new=[1, 1, 20, 65, 1])
    batch.check(batch.run(backend_of(shape), num_decodes=2))


def test_a_slot_of_minus_one_is_not_written_and_a_sequence_of_no_tokens_attends_to_none(shape: Shape) -> None:
    batch, backend = PagedBatch(shape, cached=[20, 9], new=[1, 1]), backend_of(shape)
    expected = batch.run(backend, num_decodes=2)
    before, slots = batch.cache.clone(), torch.tensor([-1, -1])
    backend.write_kv(batch.keys[0][:2], batch.values[0][:2], batch.cache, slots)
    assert batch.cache.equal(before)
    context = batch.context(2)
    assert context.context_lens is not None
    context.context_lens[1] = 0
    result = backend.decode(torch.cat(batch.queries), batch.cache, context)
    assert result[0].equal(expected[0])
    assert not result[1].any()
