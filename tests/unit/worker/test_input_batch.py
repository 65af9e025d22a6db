"""A step becomes the tensors that the model and its attention expect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tprt.messages import StepInput
from tprt.sharding import Range
from tprt.worker.input_batch import InputBuilder

BLOCK = 4


def step_input(
    query_lens: list[int],
    context_lens: list[int],
    num_decodes: int,
    token_ids: list[int] | None = None,
    samples: list[int] | None = None,
    **columns: list[float],
) -> StepInput:
    n = len(query_lens)

    def column(name: str, default: float, dtype: type) -> np.ndarray:
        return np.array(columns.get(name, [default] * n), dtype)

    num_blocks = sum(-(-length // BLOCK) for length in context_lens)
    return StepInput(
        epoch=0,
        step=0,
        num_decodes=num_decodes,
        seq_slots=np.arange(n, dtype=np.int32) + 2,
        query_lens=np.array(query_lens, np.int32),
        context_lens=np.array(context_lens, np.int32),
        token_ids=np.array(token_ids or range(10, 10 + sum(query_lens)), np.int32),
        block_ids=np.arange(100, 100 + num_blocks, dtype=np.int32),
        samples=np.array(samples or [1] * n, np.uint8),
        temperatures=column("temperatures", 0.0, np.float32),
        top_ks=column("top_ks", 0, np.int32),
        top_ps=column("top_ps", 1.0, np.float32),
        min_ps=column("min_ps", 0.0, np.float32),
        seeds=np.arange(n, dtype=np.int64),
        num_logprobs=column("num_logprobs", -1, np.int32),
    )


@pytest.fixture
def builder() -> InputBuilder:
    return InputBuilder(BLOCK, 8, torch.device("cpu"), Range(0, 50))


def test_decodes_have_block_tables_and_context_lens_and_no_cu_seqlens(builder: InputBuilder) -> None:
    batch = builder.build(step_input([1, 1], [5, 8], num_decodes=2))
    context = batch.context
    assert not context.is_prefill
    assert batch.positions.tolist() == [4, 7]
    assert context.slot_mapping.tolist() == [101 * BLOCK, 103 * BLOCK + 3]
    assert context.block_tables.tolist() == [[100, 101], [102, 103]]
    assert context.context_lens.tolist() == [5, 8]
    assert context.cu_seqlens_q is None
    assert context.cu_seqlens_k is None


def test_whole_prompts_need_no_block_tables(builder: InputBuilder) -> None:
    batch = builder.build(step_input([3, 5], [3, 5], num_decodes=0))
    context = batch.context
    assert context.is_prefill
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert context.cu_seqlens_q.tolist() == context.cu_seqlens_k.tolist() == [0, 3, 8]
    assert (context.max_seqlen_q, context.max_seqlen_k) == (5, 5)
    assert context.block_tables is None
    assert context.context_lens is None
    assert context.slot_mapping.tolist() == [400, 401, 402, 404, 405, 406, 407, 408]


def test_a_chunk_after_cached_tokens_has_block_tables_padded_with_0(builder: InputBuilder) -> None:
    context = builder.build(step_input([2, 3], [6, 3], num_decodes=0)).context
    assert context.cu_seqlens_q.tolist() == [0, 2, 5]
    assert context.cu_seqlens_k.tolist() == [0, 6, 9]
    assert context.block_tables.tolist() == [[100, 101], [102, 0]]


def test_a_mixed_step_covers_its_decodes_by_context_lens(builder: InputBuilder) -> None:
    batch = builder.build(step_input([1, 4], [7, 4], num_decodes=1, samples=[1, 0]))
    assert batch.context.is_prefill
    assert batch.context.num_decodes == 1
    assert batch.context.context_lens.tolist() == [7]
    assert batch.positions.tolist() == [6, 0, 1, 2, 3]


def test_only_sequences_that_are_sampled_have_logits_and_slots(builder: InputBuilder) -> None:
    batch = builder.build(step_input([1, 4, 2], [7, 4, 2], num_decodes=1, samples=[1, 0, 1]))
    assert batch.context.logits_indices.tolist() == [0, 6]
    assert batch.sampled_slots.tolist() == [2, 4]


def test_a_step_of_unfinished_chunks_samples_nothing(builder: InputBuilder) -> None:
    assert builder.build(step_input([4], [4], num_decodes=0, samples=[0])).sampling is None


def test_a_token_of_minus_1_is_the_one_that_its_slot_sampled_last(builder: InputBuilder) -> None:
    first = builder.build(step_input([2, 3], [2, 3], num_decodes=0))
    builder.keep_sampled(first.sampled_slots, torch.tensor([71, 72]))
    second = builder.build(step_input([1, 1], [3, 4], num_decodes=2, token_ids=[-1, 9]))
    assert second.token_ids.tolist() == [71, 9]


def test_sampling_columns_say_what_the_batch_needs(builder: InputBuilder) -> None:
    greedy = builder.build(step_input([1, 1], [5, 5], 2)).sampling
    assert (greedy.any_random, greedy.any_truncated, greedy.num_top) == (False, False, None)
    mixed = builder.build(
        step_input([1, 1], [5, 5], 2, temperatures=[0, 1], top_ks=[0, 3], num_logprobs=[-1, 4])
    ).sampling
    assert (mixed.any_random, mixed.any_truncated, mixed.num_top) == (True, True, 4)
    greedy_top_k = builder.build(step_input([1], [5], 1, top_ks=[3])).sampling
    assert not greedy_top_k.any_truncated


def test_noise_keys_depend_on_seed_and_position(builder: InputBuilder) -> None:
    steps = [step_input([1], [n], 1, temperatures=[1.0]) for n in (5, 6, 5)]
    keys = [builder.build(step).sampling.noise_keys.item() for step in steps]
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("context_lens", [[5, 30, 1, 8, 9], [8, 7, 6, 5, 5], [1, 1, 1, 1, 40]])
def test_block_tables_of_any_lengths_are_rows_padded_with_0(
    builder: InputBuilder, context_lens: list[int]
) -> None:
    step = step_input([1] * 5, context_lens, num_decodes=5)
    rows = np.split(step.block_ids, np.cumsum([-(-length // BLOCK) for length in context_lens])[:-1])
    context = builder.build(step).context
    widest = max(map(len, rows))
    expected = [[*row.tolist(), *[0] * (widest - len(row))] for row in rows]
    assert context.block_tables.tolist() == expected
    last_slots = zip(rows, context_lens, strict=True)
    assert context.slot_mapping.tolist() == [row[-1] * BLOCK + (n - 1) % BLOCK for row, n in last_slots]


@pytest.mark.parametrize(
    ("column", "value"),
    [("temperatures", 0.5), ("top_ks", 7), ("top_ps", 0.5), ("min_ps", 0.25), ("num_logprobs", 3)],
)
def test_a_parameter_that_changes_between_steps_is_noticed(
    builder: InputBuilder, column: str, value: float
) -> None:
    def build(**changes: list[float]) -> object:
        columns = {"temperatures": [1.0, 1.0], **changes}
        return builder.build(step_input([1, 1], [5, 6], 2, **columns)).sampling

    before, again = build(), build()
    assert again.temperatures is before.temperatures
    changed = build(**{column: [value, value]})
    found = changed.num_top if column == "num_logprobs" else getattr(changed, column).tolist()[1]
    assert found == value
    assert (before.any_truncated, before.num_top) == (False, None)


def test_sequences_that_change_between_steps_are_noticed(builder: InputBuilder) -> None:
    both = step_input([1, 1], [5, 6], 2, temperatures=[1.0, 1.0])
    first = builder.build(both)
    moved = builder.build(replace(both, seq_slots=both.seq_slots + 1, seeds=both.seeds + 1))
    alone = builder.build(replace(both, samples=np.array([0, 1], np.uint8)))
    assert first.sampled_slots.tolist() == [2, 3]
    assert moved.sampled_slots.tolist() == [3, 4]
    assert (first.sampling.noise_keys != moved.sampling.noise_keys).all()
    assert alone.sampled_slots.tolist() == [3]
    assert alone.sampling.noise_keys.tolist() == first.sampling.noise_keys.tolist()[1:]
