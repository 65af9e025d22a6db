"""What a step says of adjusted logits, and when the step after it must wait."""

from __future__ import annotations

import math

import pytest

from tests.unit.coordinator.driving import EOS, add, answer, make, run, schedule
from tprt.coordinator.scheduler import Scheduler
from tprt.errors import InvalidRequestError
from tprt.messages import Grammar, StepInput


def biases(step: StepInput) -> list[dict[int, float]]:
    """Return what each row of a step has added to its logits."""
    pairs = list(zip(step.bias_token_ids.tolist(), step.bias_values.tolist(), strict=True))
    return [dict(pairs.pop(0) for _ in range(count)) for count in step.bias_counts.tolist()]


def penalised(step: StepInput) -> list[dict[int, int]]:
    """Return the penalised tokens of each row and their counts in the output."""
    pairs = list(zip(step.penalty_token_ids.tolist(), step.penalty_output_counts.tolist(), strict=True))
    return [dict(pairs.pop(0) for _ in range(count)) for count in step.penalty_counts.tolist()]


def test_a_step_of_sequences_that_want_nothing_says_nothing() -> None:
    scheduler = make()
    add(scheduler, "a", 3, temperature=0.5, top_p=0.5, logprobs=2)
    assert not schedule(scheduler).adjusts_logits


def test_the_end_is_forbidden_for_as_many_tokens_as_are_wanted_at_least() -> None:
    scheduler = make()
    add(scheduler, "a", 3, min_tokens=3, stop_token_ids=(9,), logit_bias=((9, 2.0), (20, 1.0)))
    add(scheduler, "b", 2)
    for _ in range(3):
        step = schedule(scheduler)
        assert biases(step) == [{9: -math.inf, 20: 1.0, EOS: -math.inf}, {}]
        answer(scheduler, step)
    for _ in range(2):
        step = schedule(scheduler)
        assert biases(step) == [{9: 2.0, 20: 1.0}, {}]
        answer(scheduler, step)


def test_a_least_length_costs_nothing_once_it_is_reached() -> None:
    scheduler = make()
    add(scheduler, "a", 3, min_tokens=1)
    assert schedule_and_answer(scheduler).adjusts_logits
    assert not schedule_and_answer(scheduler).adjusts_logits


def schedule_and_answer(scheduler: Scheduler, token_id: int = 50) -> StepInput:
    step = schedule(scheduler)
    answer(scheduler, step, token_id)
    return step


def test_presence_and_frequency_name_the_output_and_repetition_the_prompt_too() -> None:
    scheduler = make()
    add(scheduler, "a", [7, 8, 8], presence_penalty=0.5)
    add(scheduler, "b", [7, 8, 8], repetition_penalty=2.0, frequency_penalty=1.5)
    add(scheduler, "c", [7])
    step = schedule_and_answer(scheduler, 8)
    assert step.seq_slots.tolist() == [2, 0, 1]
    assert penalised(step) == [{}, {}, {7: 0, 8: 0}]
    step = schedule_and_answer(scheduler, 9)
    assert step.seq_slots.tolist() == [0, 1, 2]
    assert penalised(step) == [{8: 1}, {7: 0, 8: 1}, {}]
    step = schedule_and_answer(scheduler, 9)
    assert penalised(step) == [{8: 1, 9: 1}, {7: 0, 8: 1, 9: 1}, {}]
    assert penalised(schedule(scheduler)) == [{8: 1, 9: 2}, {7: 0, 8: 1, 9: 2}, {}]
    assert step.presence_penalties.tolist() == [0.5, 0, 0]
    assert step.frequency_penalties.tolist() == [0, 1.5, 0]
    assert step.repetition_penalties.tolist() == [1, 2, 1]


def test_a_chunk_that_is_not_sampled_has_no_adjustments() -> None:
    scheduler = make()
    add(scheduler, "a", 20, repetition_penalty=2.0, logit_bias=((4, 1.0),))
    step = schedule_and_answer(scheduler)
    assert step.samples.tolist() == [0]
    assert not step.adjusts_logits
    step = schedule(scheduler)
    assert step.samples.tolist() == [1]
    assert len(step.penalty_token_ids) == 20
    assert biases(step) == [{4: 1.0}]


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_no_step_is_sent_ahead_while_a_sequence_with_penalties_runs(name: str) -> None:
    scheduler = make()
    add(scheduler, "a", 3, max_tokens=9)
    add(scheduler, "b", 3, max_tokens=3, **{name: 0.5})
    for _ in range(2):
        step = schedule(scheduler)
        assert scheduler.schedule_ahead() is None
        answer(scheduler, step)
    # Its last token: it is not in the step after this one.
    step = schedule(scheduler)
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert ahead.seq_slots.tolist() == [0]


def test_biases_and_least_lengths_are_sent_ahead() -> None:
    scheduler = make()
    add(scheduler, "a", 3, min_tokens=2, logit_bias=((4, 1.0),))
    steps = [schedule(scheduler)]
    for _ in range(3):
        ahead = scheduler.schedule_ahead()
        assert ahead is not None
        answer(scheduler, steps[-1])
        steps.append(ahead)
    assert [len(step.bias_token_ids) for step in steps] == [2, 2, 1, 1]


def test_an_aborted_sequence_leaves_no_adjustment_behind() -> None:
    scheduler = make()
    add(scheduler, "a", 3, repetition_penalty=2.0)
    add(scheduler, "b", 3)
    run(scheduler)
    scheduler.abort("a")
    step = schedule(scheduler)
    assert not step.adjusts_logits
    assert scheduler.schedule_ahead() is not None


def test_a_grammar_without_a_tokenizer_is_refused() -> None:
    scheduler = make()
    with pytest.raises(InvalidRequestError, match="a grammar needs one"):
        add(scheduler, "a", 3, grammar=Grammar("regex", "a"))
    assert not scheduler.has_unfinished
