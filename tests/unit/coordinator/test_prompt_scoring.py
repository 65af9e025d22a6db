"""Each log-probability of a prompt is asked for once it must be, and sent once, whatever happens meanwhile."""

from __future__ import annotations

import pytest

from tests.unit.coordinator.driving import add, answer, make, run, schedule
from tprt.coordinator.result import StepResult
from tprt.coordinator.scheduler import Scheduler
from tprt.errors import InvalidRequestError
from tprt.messages import SamplingParams, StepInput

PROMPT = list(range(100, 140))


def asked(step: StepInput) -> list[tuple[int, int]]:
    """Return (token of the step, the one after it) for each row to score."""
    tokens = step.token_ids[step.prompt_rows].tolist()
    return list(zip(tokens, step.prompt_row_targets.tolist(), strict=True))


def sent(result: StepResult) -> dict[object, list[int]]:
    return {key: (-news.logprobs).astype(int).tolist() for key, news in result.prompt_logprobs}


def pairs(start: int, end: int) -> list[tuple[int, int]]:
    """Return the tokens of `PROMPT` at the positions from `start` to before `end`, and those after them."""
    return list(zip(PROMPT[start:end], PROMPT[start + 1 : end + 1], strict=True))


def run_all(scheduler: Scheduler) -> dict[object, list[int]]:
    found: dict[object, list[int]] = {}
    while scheduler.has_unfinished:
        for key, tokens in sent(run(scheduler)).items():
            found.setdefault(key, []).extend(tokens)
    return found


def test_chunks_bring_their_rows_and_the_last_token_has_none_after_it() -> None:
    scheduler = make()
    add(scheduler, "a", PROMPT[:36], prompt_logprobs=1, max_tokens=2)
    found = []
    for first, end in ((0, 16), (16, 32), (32, 35)):
        step = schedule(scheduler)
        assert asked(step) == pairs(first, end)
        found += sent(answer(scheduler, step))["a"]
    assert found == PROMPT[1:36]
    step = schedule(scheduler)
    assert len(step.prompt_rows) == 0
    assert answer(scheduler, step).prompt_logprobs == ()


def test_a_step_that_nobody_wants_anything_of_says_nothing() -> None:
    scheduler = make()
    add(scheduler, "a", 3)
    add(scheduler, "b", 1, prompt_logprobs=2)
    step = schedule(scheduler)
    assert (len(step.prompt_rows), step.num_prompt_top) == (0, 0)


def test_each_request_gets_its_own_rows_and_as_many_alternatives_as_it_wants() -> None:
    scheduler = make()
    add(scheduler, "a", PROMPT[:4], prompt_logprobs=3)
    add(scheduler, "b", PROMPT[10:13])
    add(scheduler, "c", PROMPT[20:26], prompt_logprobs=0)
    step = schedule(scheduler)
    assert asked(step) == pairs(0, 3) + pairs(20, 25)
    assert step.num_prompt_top == 3
    result = answer(scheduler, step)
    assert sent(result) == {"a": PROMPT[1:4], "c": PROMPT[21:26]}
    first, second = (news for _, news in result.prompt_logprobs)
    assert (first.num_top, first.top_token_ids.tolist()) == (3, [0, 1, 2] * 3)
    assert (second.num_top, second.top_logprobs.tolist()) == (0, [])


def test_what_is_to_be_scored_is_computed_though_it_is_cached() -> None:
    scheduler = make()
    add(scheduler, "a", PROMPT[:12], max_tokens=1)
    run(scheduler)
    add(scheduler, "b", PROMPT[:12], max_tokens=1, prompt_logprobs=0)
    add(scheduler, "c", PROMPT[:12], max_tokens=1)
    step = schedule(scheduler)
    assert step.query_lens.tolist() == [12, 4]
    assert answer(scheduler, step).num_cached_tokens.tolist() == [0, 8]


def test_a_preempted_prompt_goes_on_where_its_scores_end_and_takes_what_is_cached_before() -> None:
    scheduler = make(num_blocks=10)
    add(scheduler, "a", 11, max_tokens=20)
    add(scheduler, "b", PROMPT[:24], prompt_logprobs=0, max_tokens=3)
    found = sent(run(scheduler))["b"]
    assert found == PROMPT[1:6]
    scheduler._preempt(scheduler._sequences["b"].slot)
    step = schedule(scheduler)
    # Of five scored positions four fill a block, which is still there.
    assert step.context_lens.tolist() == [12, 19]
    assert step.query_lens.tolist() == [1, 15]
    assert asked(step) == pairs(5, 19)
    found += sent(answer(scheduler, step))["b"]
    scheduler.reset_for_epoch(1)
    found += run_all(scheduler)["b"]
    assert found == PROMPT[1:24]


def test_rows_of_a_failed_group_are_asked_for_again_and_sent_ones_are_not() -> None:
    scheduler = make()
    add(scheduler, "a", PROMPT[:36], prompt_logprobs=0, max_tokens=1)
    found = sent(run(scheduler))["a"]
    lost = schedule(scheduler)
    assert asked(lost) == pairs(16, 32)
    scheduler.reset_for_epoch(1)
    assert asked(schedule(scheduler)) == []
    scheduler.reset_for_epoch(2)
    found += run_all(scheduler)["a"]
    assert found == PROMPT[1:36]


def test_a_sequence_that_was_scored_and_is_computed_again_takes_all_that_is_cached() -> None:
    scheduler = make()
    add(scheduler, "a", PROMPT[:12], prompt_logprobs=0, max_tokens=9)
    run(scheduler)
    run(scheduler)
    scheduler._preempt(scheduler._sequences["a"].slot)
    step = schedule(scheduler)
    assert step.query_lens.tolist() == [2]
    assert len(step.prompt_rows) == 0


def test_a_step_ahead_of_the_last_chunk_asks_for_nothing_twice() -> None:
    scheduler = make(max_num_seqs=1, max_num_batched_tokens=4)
    add(scheduler, "a", PROMPT[:5], prompt_logprobs=0, max_tokens=2)
    step = schedule(scheduler)
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert (asked(step), asked(ahead)) == (pairs(0, 4), [])
    assert sent(answer(scheduler, step)) == {"a": PROMPT[1:5]}


def test_a_request_that_is_gone_gets_nothing_and_leaves_no_wish_behind() -> None:
    scheduler = make()
    add(scheduler, "a", PROMPT[:36], prompt_logprobs=0)
    add(scheduler, "b", 3)
    step = schedule(scheduler)
    scheduler.abort("a")
    assert sent(answer(scheduler, step)) == {}
    assert scheduler._table.num_scored == 0
    assert len(schedule(scheduler).prompt_rows) == 0


@pytest.mark.parametrize("count", [-1, 21])
def test_a_number_of_alternatives_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"prompt_logprobs is {count}; expected from 0 to 20"):
        SamplingParams(prompt_logprobs=count)
