"""Steps that launch, between them, the kernels that a start and the first requests launch.

A kernel is compiled anew for each way in which the work is cut. That follows from the number of tokens, from
whether keys are in KV blocks or in the step itself, and from how tokens are chosen. Steps of decodes alone are
not here, since they are captured in every size. Knows nothing of kernels and devices.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tprt.config import SchedulerConfig
from tprt.messages import StepInput
from tprt.worker.workspace import largest_step, prompt_step

# As many rows as tensor cores multiply at once, two and four times as many, and more than that.
_PROMPT_LENS = (16, 32, 64, 128)


def steps_to_rehearse(scheduler: SchedulerConfig, max_model_len: int, block_size: int) -> list[StepInput]:
    """Return the largest step there can be, prompts alone and behind a cached prefix, and decodes beside one.

    One KV block, number 0, is enough for all of them. None wants log-probabilities: those are looked up by the
    tokens that were chosen, which a kernel that does not run leaves open.
    """
    largest = largest_step(scheduler, max_model_len, block_size)
    steps = [replace(largest, num_logprobs=np.full_like(largest.num_logprobs, -1))]
    longest = min(scheduler.max_num_batched_tokens, max_model_len)
    for num_tokens in sorted({min(num_tokens, longest) for num_tokens in _PROMPT_LENS}):
        for num_cached in (0, block_size):
            if num_cached + num_tokens <= max_model_len:
                steps.append(prompt_step(np.array([num_tokens], np.int32), block_size, num_cached))
    # The work of decodes is cut as that of the next power of two would be.
    num_decodes = 1
    while num_decodes < min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens):
        step = prompt_step(np.ones(num_decodes + 1, np.int32), block_size)
        steps.append(replace(step, num_decodes=num_decodes))
        num_decodes *= 2
    return steps
