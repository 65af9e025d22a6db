"""Sharing, preemption, aborts and new worker groups: who holds which blocks, and when."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.coordinator.driving import add, answer, make, run, schedule
from tprt.coordinator.scheduler import Scheduler
from tprt.messages import FinishReason, StepOutput


def test_a_finished_prompt_is_not_computed_again_but_for_its_last_token() -> None:
    scheduler = make()
    prompt = list(range(3, 15))
    add(scheduler, "a", prompt, max_tokens=1)
    assert run(scheduler).num_cached_tokens.tolist() == [0]
    add(scheduler, "b", prompt, max_tokens=1)
    step = schedule(scheduler)
    assert step.query_lens.tolist() == [4]
    assert step.context_lens.tolist() == [12]
    assert answer(scheduler, step).num_cached_tokens.tolist() == [8]


def test_the_prompt_of_a_running_sequence_is_shared_while_it_runs() -> None:
    scheduler = make()
    prompt = list(range(3, 15))
    add(scheduler, "a", prompt)
    run(scheduler)
    add(scheduler, "b", [*prompt, 99])
    step = schedule(scheduler)
    first, second = step.block_ids[:4], step.block_ids[4:]
    assert first[:3].tolist() == second[:3].tolist()
    assert first[3] != second[3]


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make()
    add(scheduler, "a", list(range(3, 9)), max_tokens=6)
    for _ in range(6):
        run(scheduler)
    add(scheduler, "b", [*range(3, 9), *[50] * 6, 99])
    step = schedule(scheduler)
    # 11 tokens of the first turn were computed, the last one was only sampled: two full blocks of four.
    assert (step.context_lens - step.query_lens).tolist() == [8]


def test_a_block_is_not_found_before_the_step_that_fills_it_is_done() -> None:
    scheduler = make(max_num_batched_tokens=32)
    prompt = list(range(3, 15))
    add(scheduler, "a", prompt)
    add(scheduler, "b", prompt)
    assert schedule(scheduler).query_lens.tolist() == [12, 12]


def test_nothing_is_shared_when_prefix_caching_is_off() -> None:
    scheduler = make(enable_prefix_caching=False)
    prompt = list(range(3, 15))
    add(scheduler, "a", prompt, max_tokens=1)
    run(scheduler)
    add(scheduler, "b", prompt, max_tokens=1)
    assert schedule(scheduler).query_lens.tolist() == [12]


def _two_that_outgrow_the_blocks() -> Scheduler:
    """Two sequences that use up all blocks; the next step needs one more for each."""
    scheduler = make(num_blocks=5)
    add(scheduler, "a", 4, max_tokens=20)
    add(scheduler, "b", 4, max_tokens=20)
    while scheduler.counters.num_preemptions == 0:
        run(scheduler)
    return scheduler


def test_the_sequence_admitted_last_is_preempted_and_the_oldest_ends_first() -> None:
    scheduler = _two_that_outgrow_the_blocks()
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    order: list[str] = []
    while scheduler.has_unfinished:
        result = run(scheduler)
        order += result.keys[result.finish_reasons != FinishReason.NONE].tolist()
    assert order == ["a", "b"]
    assert scheduler.num_free_blocks == 5


def test_a_preempted_sequence_waits_before_those_that_have_not_run() -> None:
    scheduler = make(num_blocks=5, max_num_seqs=2, enable_prefix_caching=False)
    for key in "abc":
        add(scheduler, key, 4, max_tokens=12)
    while scheduler.counters.num_preemptions == 0:
        run(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    scheduler.abort("a")
    assert run(scheduler).keys.tolist() == ["b", "c"]


def test_a_preempted_sequence_is_prefilled_with_the_tokens_it_has_generated() -> None:
    scheduler = _two_that_outgrow_the_blocks()
    scheduler.abort("a")
    step = schedule(scheduler)
    assert len(step.seq_slots) == 1
    prompt = [203 + i for i in range(4)]
    assert int(step.context_lens[0]) > 4
    expected = (prompt + [50] * 20)[: int(step.context_lens[0])]
    assert step.token_ids.tolist() == expected[-len(step.token_ids) :]


def test_aborting_what_is_unknown_or_ended_does_nothing() -> None:
    scheduler = make()
    scheduler.abort("nobody")
    add(scheduler, "a", 3, max_tokens=1)
    run(scheduler)
    scheduler.abort("a")
    scheduler.check()


def test_an_aborted_waiting_request_never_runs() -> None:
    scheduler = make()
    add(scheduler, "a", 3)
    scheduler.abort("a")
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished


def test_the_blocks_of_a_sequence_aborted_in_flight_are_kept_until_the_step_is_back() -> None:
    scheduler = make()
    add(scheduler, "a", 10)
    step = schedule(scheduler)
    scheduler.abort("a")
    assert not scheduler.has_unfinished
    assert scheduler.num_free_blocks == 37
    result = answer(scheduler, step)
    assert len(result.keys) == 0
    assert scheduler.num_free_blocks == 40


def test_the_output_of_a_sequence_aborted_in_flight_is_dropped_and_that_of_others_is_not() -> None:
    scheduler = make()
    for key in "abc":
        add(scheduler, key, 2, logprobs=2)
    step = schedule(scheduler)
    scheduler.abort("b")
    output = StepOutput(
        epoch=0,
        step=0,
        token_ids=np.array([10, 11, 12], np.int32),
        logprobs=np.array([-1, -2, -3], np.float32),
        top_token_ids=np.arange(6, dtype=np.int32),
        top_logprobs=np.arange(6, dtype=np.float32),
        num_top=2,
    )
    assert step.num_logprobs.tolist() == [2, 2, 2]
    result = scheduler.update(output)
    assert result.keys.tolist() == ["a", "c"]
    assert result.token_ids.tolist() == [10, 12]
    assert result.logprobs.tolist() == [-1, -3]
    assert result.top_token_ids.tolist() == [0, 1, 4, 5]
    assert result.top_logprobs.tolist() == [0, 1, 4, 5]


def test_a_key_can_be_used_again_at_once_after_an_abort_in_flight() -> None:
    scheduler = make()
    add(scheduler, "a", 3)
    step = schedule(scheduler)
    scheduler.abort("a")
    add(scheduler, "a", [7, 8], max_tokens=1)
    assert len(answer(scheduler, step).keys) == 0
    step = schedule(scheduler)
    assert step.token_ids.tolist() == [7, 8]
    assert answer(scheduler, step).keys.tolist() == ["a"]


def test_scheduling_twice_without_an_update_is_our_own_bug() -> None:
    scheduler = make()
    add(scheduler, "a", 3)
    schedule(scheduler)
    with pytest.raises(AssertionError, match="brought back"):
        scheduler.schedule()


def test_after_a_new_epoch_unfinished_sequences_start_again_in_order_with_their_tokens() -> None:
    scheduler = make(max_num_batched_tokens=32)
    for key in "abcde":
        add(scheduler, key, 3, max_tokens=9)
    run(scheduler)
    scheduler.abort("b")
    schedule(scheduler)  # lost with the worker group
    scheduler.reset_for_epoch(4)
    scheduler.check()
    assert scheduler.num_free_blocks == 40
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 4)
    step = schedule(scheduler)
    assert (step.epoch, step.step) == (4, 0)
    assert step.query_lens.tolist() == [4, 4, 4, 3]
    assert step.token_ids[:4].tolist() == [103, 104, 105, 50]
    assert answer(scheduler, step).keys.tolist() == ["a", "c", "d", "e"]


def test_the_same_calls_give_the_same_steps() -> None:
    def steps() -> list[list[int]]:
        scheduler = _two_that_outgrow_the_blocks()
        seen = []
        while (step := scheduler.schedule()) is not None:
            seen.append([*step.token_ids.tolist(), *step.block_ids.tolist(), *step.seq_slots.tolist()])
            answer(scheduler, step)
        return seen

    assert steps() == steps()
