"""The scheduler against a simulated worker whose next token depends on what the block tables make visible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.coordinator.simulated_engine import EOS, VOCAB_SIZE, Engine, next_token
from tprt.coordinator.limits import SchedulerLimits
from tprt.errors import InvalidRequestError
from tprt.messages import FinishReason, Grammar, SamplingParams

# Prompts that share prefixes of many lengths, and blocks of equal tokens after different prefixes.
STREAM = np.random.default_rng(5).integers(0, VOCAB_SIZE, 40).tolist()
OTHER = STREAM[:17] + np.random.default_rng(6).integers(0, VOCAB_SIZE, 23).tolist()
TWIN = [(STREAM[0] + 1) % VOCAB_SIZE, *STREAM[1:]]
STREAMS = [STREAM, OTHER, TWIN]
tails = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4)
prompts = st.builds(
    lambda stream, length, tail: (stream[:length] + tail) or [0],
    st.sampled_from(STREAMS),
    st.integers(0, 30),
    tails,
)
# The logits of the simulation are sums of powers of two, as is what is done to them: nothing is rounded.
plain = {
    "max_tokens": st.integers(1, 30),
    "seed": st.sampled_from([None, 1, 2]),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.sampled_from([(), (), (3,), (2, 4, 5)]),
    "prompt_logprobs": st.sampled_from([None, None, 0, 2]),
}
grammars = st.sampled_from(["(ab|cd){1,4}e", "[a-l]*k", "abc", "[a-d]{3,20}"])
adjusting = {
    "presence_penalty": st.sampled_from([0.0, -0.5, 1.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.25, -1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 2.0]),
    "logit_bias": st.sampled_from([(), ((EOS, 1.0),), ((3, -100.0), (EOS, -1.5))]),
    "grammar": st.none() | grammars.map(lambda regex: Grammar("regex", regex)),
}
samplings = st.builds(SamplingParams, **plain) | st.builds(
    lambda max_tokens, least, **others: SamplingParams(
        max_tokens=max_tokens, min_tokens=min(least, max_tokens), **others
    ),
    least=st.integers(0, 20),
    **plain,
    **adjusting,
)
all_limits = st.builds(
    lambda seqs, extra, length, size, blocks, caching: SchedulerLimits(
        seqs, seqs + extra, length, size, blocks, caching
    ),
    st.integers(1, 6),
    st.sampled_from([0, 1, 5, 40]),
    st.integers(8, 64),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(2, 24),
    st.booleans(),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Arbitrary arrivals, aborts and worker failures at arbitrary times."""

    @initialize(limits=all_limits)
    def start(self, limits: SchedulerLimits) -> None:
        self.engine = Engine(limits)

    @rule(prompt=prompts, sampling=samplings)
    def add(self, prompt: list[int], sampling: SamplingParams) -> None:
        self.add_prompt(prompt, sampling)

    def add_prompt(self, prompt: list[int], sampling: SamplingParams) -> None:
        try:
            self.engine.add(prompt, sampling)
        except InvalidRequestError:
            assert len(prompt) > self.engine.limits.max_sequence_len - 1

    @rule(data=st.data(), tail=tails, sampling=samplings)
    @precondition(lambda self: self.engine.requests)
    def next_turn(self, data: st.DataObject, tail: list[int], sampling: SamplingParams) -> None:
        """Send a prompt that goes on from the output of an earlier request."""
        earlier = self.engine.requests[data.draw(st.sampled_from(sorted(self.engine.requests)))]
        self.add_prompt([*earlier.request.prompt_token_ids.tolist(), *earlier.token_ids, *tail], sampling)

    @rule(data=st.data())
    @precondition(lambda self: self.engine.requests)
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @rule()
    @precondition(lambda self: self.engine.output is None)
    def schedule(self) -> None:
        had_unfinished = self.engine.scheduler.has_unfinished
        assert (self.engine.schedule() is not None) == had_unfinished

    @rule()
    @precondition(lambda self: self.engine.output is not None)
    def schedule_ahead(self) -> None:
        self.engine.schedule_ahead()

    @rule()
    @precondition(lambda self: self.engine.output is not None)
    def update(self) -> None:
        self.engine.update()

    @rule(count=st.integers(1, 12))
    @precondition(lambda self: self.engine.output is None)
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine.output is not None or self.engine.schedule() is not None:
                self.engine.schedule_ahead()
                self.engine.update()

    @rule()
    def replace_worker(self) -> None:
        self.engine.replace_worker()

    @invariant()
    def everything_agrees(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.finish()
            event(f"preempted: {self.engine.scheduler.counters.num_preemptions > 0}")
            event(f"ran ahead: {self.engine.num_ahead > 0}")


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def _crowd(limits: SchedulerLimits) -> Engine:
    """Many requests with common prefixes, arriving while others run."""
    engine = Engine(limits)
    rng = np.random.default_rng(1)
    for _ in range(60):
        earlier = engine.requests[int(rng.integers(len(engine.requests)))] if engine.requests else None
        if earlier is not None and earlier.reason != FinishReason.NONE and rng.random() < 0.5:
            prompt = [*earlier.request.prompt_token_ids.tolist(), *earlier.token_ids][:40]
        else:
            prompt = STREAMS[int(rng.integers(3))][: int(rng.integers(1, 30))]
        prompt = [*prompt, *rng.integers(0, VOCAB_SIZE, int(rng.integers(4))).tolist()]
        sampling = SamplingParams(
            max_tokens=int(rng.integers(1, 25)),
            seed=int(rng.integers(3)),
            prompt_logprobs=[None, None, None, 1][int(rng.integers(4))],
        )
        engine.add(prompt, sampling)
        for _ in range(int(rng.integers(3))):
            if engine.output is not None or engine.schedule() is not None:
                engine.schedule_ahead()
                engine.update()
                engine.scheduler.check()
    engine.finish()
    assert engine.num_ahead > 20
    return engine


@pytest.mark.parametrize("caching", [True, False])
def test_a_crowd_in_little_memory_is_preempted_and_still_gets_the_tokens_of_an_unconstrained_run(
    caching: bool,
) -> None:
    engine = _crowd(SchedulerLimits(8, 24, 60, 4, 12, caching))
    assert engine.scheduler.counters.num_preemptions > 3


def test_a_crowd_with_plenty_of_memory_gets_the_same_tokens_without_preemption() -> None:
    engine = _crowd(SchedulerLimits(8, 24, 60, 4, 400, True))
    assert engine.scheduler.counters.num_preemptions == 0


def test_the_simulated_worker_notices_kv_of_another_prefix() -> None:
    limits = SchedulerLimits(2, 64, 60, 4, 20, True)
    engine = Engine(limits)
    engine.add(STREAM[:12], SamplingParams(max_tokens=4, seed=1))
    step = engine.scheduler.schedule()
    assert step is not None
    engine.worker.run(step)
    wrong = engine.worker._values.copy()
    wrong[int(step.block_ids[0]) * 4] += 1
    right_token = next_token(engine.worker._values[:12], 1)
    slots = engine.worker._slot_mapping(step.block_ids, 12)
    assert next_token(wrong[slots], 1) != right_token
