from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.result import StepResult
from tprt.coordinator.scheduler import Scheduler
from tprt.messages import AddRequest, FinishReason, SamplingParams, StepInput, StepOutput

EOS = 2
LIMITS = SchedulerLimits(
    max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=40
)


def make(**changes: object) -> Scheduler:
    return Scheduler(dataclasses.replace(LIMITS, **changes), (EOS,), 1000, draw_seed=lambda: 77)  # type: ignore[arg-type]


def add(scheduler: Scheduler, key: str, prompt: int | list[int], **sampling: object) -> None:
    """Add a request; a prompt given as a number is that many tokens of its own."""
    if isinstance(prompt, int):
        prompt = [100 * (ord(key[-1]) - ord("a") + 1) % 900 + 3 + i for i in range(prompt)]
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    scheduler.add(key, AddRequest(0, np.array(prompt, np.int32), params))


def answer(scheduler: Scheduler, step: StepInput, token_id: int = 50) -> StepResult:
    """Bring back `token_id` for every sampled sequence."""
    n = int(step.samples.sum())
    result = scheduler.update(StepOutput(step.epoch, step.step, np.full(n, token_id, np.int32)))
    scheduler.check()
    return result


def schedule(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule()
    assert step is not None
    return step


def run(scheduler: Scheduler, token_id: int = 50) -> StepResult:
    return answer(scheduler, schedule(scheduler), token_id)


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
    while scheduler.num_preemptions == 0:
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
    while scheduler.num_preemptions == 0:
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
