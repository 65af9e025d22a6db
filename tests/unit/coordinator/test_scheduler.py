"""Which tokens are in a step, and when a request ends."""

from __future__ import annotations

import pytest

from tests.unit.coordinator.driving import EOS, LIMITS, add, answer, make, run, schedule
from tprt.coordinator.scheduler import Scheduler
from tprt.errors import InvalidRequestError
from tprt.messages import FinishReason


def test_nothing_is_scheduled_when_there_is_nothing_to_run() -> None:
    scheduler = make()
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    scheduler = make()
    add(scheduler, "a", 36)
    chunks = []
    for _ in range(3):
        step = schedule(scheduler)
        chunks.append((step.query_lens.tolist(), step.context_lens.tolist(), step.samples.tolist()))
        answer(scheduler, step)
    assert chunks == [([16], [16], [0]), ([16], [32], [0]), ([4], [36], [1])]


def test_decodes_come_first_and_prompts_share_what_they_leave_of_the_budget() -> None:
    scheduler = make()
    add(scheduler, "a", 10)
    add(scheduler, "b", 20)
    run(scheduler)
    step = schedule(scheduler)
    assert step.num_decodes == 1
    assert step.seq_slots.tolist() == [0, 1]
    assert step.query_lens.tolist() == [1, 14]
    assert step.samples.tolist() == [1, 1]
    assert step.token_ids[0] == 50


def test_a_prompt_of_one_token_is_a_decode_and_comes_before_longer_ones() -> None:
    scheduler = make()
    add(scheduler, "a", 10)
    add(scheduler, "b", 1)
    step = schedule(scheduler)
    assert step.num_decodes == 1
    assert step.seq_slots.tolist() == [1, 0]
    assert answer(scheduler, step).keys.tolist() == ["b", "a"]


def test_a_chunk_of_one_token_that_does_not_end_its_prompt_is_no_decode() -> None:
    scheduler = make(max_num_batched_tokens=4)
    add(scheduler, "a", 3)
    add(scheduler, "b", 9)
    step = schedule(scheduler)
    assert step.query_lens.tolist() == [3, 1]
    assert step.samples.tolist() == [1, 0]
    assert step.num_decodes == 0


def test_waiting_sequences_are_admitted_in_their_order_and_none_overtakes() -> None:
    scheduler = make(num_blocks=8)
    add(scheduler, "a", 12)
    add(scheduler, "b", 24)
    add(scheduler, "c", 1)
    run(scheduler)
    run(scheduler)
    assert scheduler.num_running == 1
    assert scheduler.num_waiting == 2


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make()
    for key in "abcdef":
        add(scheduler, key, 1)
    assert len(schedule(scheduler).seq_slots) == 4
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 2)


def test_the_step_input_carries_the_sampling_parameters_of_each_sequence() -> None:
    scheduler = make()
    add(scheduler, "a", 2, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=5, logprobs=3)
    add(scheduler, "b", 2)
    step = schedule(scheduler)
    assert step.temperatures.tolist() == [0.5, 1.0]
    assert step.top_ks.tolist() == [7, 0]
    assert step.top_ps.tolist() == pytest.approx([0.9, 1.0])
    assert step.min_ps.tolist() == pytest.approx([0.1, 0.0])
    assert step.seeds.tolist() == [5, 77]
    assert step.num_logprobs.tolist() == [3, -1]


def test_a_temperature_that_logits_cannot_be_divided_by_is_greedy() -> None:
    scheduler = make()
    add(scheduler, "a", 2, temperature=1e-38)
    add(scheduler, "b", 2, temperature=1e-5)
    assert schedule(scheduler).temperatures.tolist() == pytest.approx([0.0, 1e-5])


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    scheduler = Scheduler(LIMITS, (EOS,), 1000)
    add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    first, second = schedule(scheduler).seeds.tolist()
    assert first != second
    assert first >= 0 <= second


@pytest.mark.parametrize(
    ("sampling", "token_id", "reason"),
    [
        ({"max_tokens": 9}, EOS, FinishReason.STOP),
        ({"max_tokens": 9, "ignore_eos": True}, EOS, FinishReason.NONE),
        ({"max_tokens": 9, "stop_token_ids": (8, 9)}, 9, FinishReason.STOP),
        ({"max_tokens": 9, "stop_token_ids": (8, 9), "ignore_eos": True}, 8, FinishReason.STOP),
        ({"max_tokens": 9, "stop_token_ids": (8, 9)}, EOS, FinishReason.STOP),
        ({"max_tokens": 9}, 50, FinishReason.NONE),
        ({"max_tokens": 1}, 50, FinishReason.LENGTH),
        ({"max_tokens": 1}, EOS, FinishReason.STOP),
    ],
)
def test_a_request_ends_with(sampling: dict[str, object], token_id: int, reason: FinishReason) -> None:
    scheduler = make()
    add(scheduler, "a", 3, **sampling)
    result = run(scheduler, token_id)
    assert result.token_ids.tolist() == [token_id]
    assert result.finish_reasons.tolist() == [reason]
    assert scheduler.has_unfinished == (reason == FinishReason.NONE)


def test_stop_tokens_of_one_request_do_not_end_another() -> None:
    scheduler = make()
    add(scheduler, "a", 3, max_tokens=9, stop_token_ids=(8,))
    add(scheduler, "b", 3, max_tokens=9)
    assert run(scheduler, 8).finish_reasons.tolist() == [FinishReason.STOP, FinishReason.NONE]


def test_generation_ends_at_max_model_len() -> None:
    scheduler = make(max_model_len=8)
    add(scheduler, "a", 5, max_tokens=100)
    reasons = [run(scheduler).finish_reasons[0] for _ in range(3)]
    assert reasons == [FinishReason.NONE, FinishReason.NONE, FinishReason.LENGTH]


def test_generation_ends_where_all_blocks_together_end() -> None:
    scheduler = make(num_blocks=2)
    add(scheduler, "a", 6, max_tokens=100)
    reasons = [run(scheduler).finish_reasons[0] for _ in range(3)]
    assert reasons == [FinishReason.NONE, FinishReason.NONE, FinishReason.LENGTH]
    assert scheduler.num_free_blocks == 2


def test_a_request_that_has_tokens_of_its_output_goes_on_from_them() -> None:
    scheduler = make()
    add(scheduler, "a", 5, output=[60, 61], max_tokens=4, prompt_logprobs=0)
    step = schedule(scheduler)
    assert step.token_ids[-2:].tolist() == [60, 61]
    assert step.context_lens.tolist() == [7]
    assert len(step.prompt_rows) == 0, "the prompt was scored before its output began"
    assert answer(scheduler, step).finish_reasons.tolist() == [FinishReason.NONE]
    assert run(scheduler).finish_reasons.tolist() == [FinishReason.LENGTH], "4 tokens of output, 2 of them new"


def test_of_a_request_that_has_tokens_of_its_output_only_those_of_the_prompt_count_as_cached() -> None:
    scheduler = make()
    add(scheduler, "a", 5, output=range(60, 67), max_tokens=8)
    assert run(scheduler).finish_reasons.tolist() == [FinishReason.LENGTH]
    add(scheduler, "a", 5, output=range(60, 67), max_tokens=8)
    step = schedule(scheduler)
    assert step.query_lens.tolist() == [4], "two blocks are found, of 4 tokens each"
    assert answer(scheduler, step).num_cached_tokens.tolist() == [5]
    assert scheduler.counters.num_cached_tokens == 5


def test_penalties_and_the_shortest_output_count_the_tokens_that_are_there_already() -> None:
    scheduler = make()
    add(scheduler, "a", 5, output=[60, 60], presence_penalty=1.0, frequency_penalty=0.5, min_tokens=3)
    whole = make()
    add(whole, "a", 5, presence_penalty=1.0, frequency_penalty=0.5, min_tokens=3)
    run(whole, 60)
    run(whole, 60)
    resumed, expected = schedule(scheduler), schedule(whole)
    for column in ("penalty_token_ids", "penalty_output_counts", "bias_token_ids", "bias_values"):
        assert getattr(resumed, column).tolist() == getattr(expected, column).tolist() != []


def test_output_that_is_there_already_must_leave_room_for_more() -> None:
    scheduler = make()
    with pytest.raises(InvalidRequestError, match="64 tokens"):
        add(scheduler, "a", 60, output=[7, 8, 9, 10])
