"""Short names for driving a scheduler by hand in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.result import StepResult
from tprt.coordinator.scheduler import Scheduler
from tprt.messages import AddRequest, SamplingParams, ScoredStepOutput, StepInput

EOS = 2
LIMITS = SchedulerLimits(
    max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=40
)


def make(**changes: object) -> Scheduler:
    return Scheduler(dataclasses.replace(LIMITS, **changes), (EOS,), 1000, draw_seed=lambda: 77)  # type: ignore[arg-type]


def add(
    scheduler: Scheduler, key: str, prompt: int | list[int], output: Sequence[int] = (), **sampling: object
) -> None:
    """Add a request; a prompt given as a number is that many tokens of its own, `output` is there already."""
    if isinstance(prompt, int):
        prompt = [100 * (ord(key[-1]) - ord("a") + 1) % 900 + 3 + i for i in range(prompt)]
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    tokens, known = np.array(prompt, np.int32), np.array(output, np.int32)
    scheduler.add(key, AddRequest(0, tokens, params, known))


def answer(scheduler: Scheduler, step: StepInput, token_id: int = 50) -> StepResult:
    """Bring back `token_id` for every sampled sequence, and for each prompt token to score minus its id."""
    tokens = np.full(int(step.samples.sum()), token_id, np.int32)
    num_top, scores = step.num_prompt_top, -step.prompt_row_targets.astype(np.float32)
    best = np.tile(np.arange(num_top, dtype=np.int32), len(scores))
    output = ScoredStepOutput(
        epoch=step.epoch,
        step=step.step,
        token_ids=tokens,
        prompt_logprobs=scores,
        prompt_top_token_ids=best,
        prompt_top_logprobs=-best.astype(np.float32),
        num_prompt_top=num_top,
    )
    result = scheduler.update(output)
    scheduler.check()
    return result


def schedule(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule()
    assert step is not None
    return step


def run(scheduler: Scheduler, token_id: int = 50) -> StepResult:
    return answer(scheduler, schedule(scheduler), token_id)
