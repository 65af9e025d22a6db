"""Sampled tokens on their way from the device: copied behind the step that samples them, waited for later.

Knows nothing of how tokens are chosen.
"""

from __future__ import annotations

import numpy as np
import torch

from tprt.layers.sampler import Sampled
from tprt.messages import ScoredStepOutput, StepInput, StepOutput

# One step is waited for while the next is begun.
_NUM_BUFFERS = 3


class PendingOutput:
    """The output of a step that may still run."""

    def __init__(
        self,
        step: StepInput,
        sampled: Sampled | None,
        prompt: Sampled | None,
        arrived: torch.cuda.Event | None,
    ) -> None:
        self._step = step
        self._sampled = sampled
        self._prompt = prompt
        self._arrived = arrived

    def is_there(self) -> bool:
        """Tell whether `wait` returns at once."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> StepOutput:
        """Return the output once the device has made it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        output = self._sampled_output()
        return output if self._prompt is None else _with_prompt(output, self._prompt)

    def _sampled_output(self) -> StepOutput:
        step, sampled = self._step, self._sampled
        if sampled is None:
            return StepOutput(step.epoch, step.step, np.empty(0, np.int32))
        # A copy: the buffer is another step's before long.
        token_ids = sampled.token_ids.to(torch.int32, copy=True).numpy()
        if sampled.logprobs is None or sampled.top_token_ids is None or sampled.top_logprobs is None:
            return StepOutput(step.epoch, step.step, token_ids)
        return StepOutput(
            epoch=step.epoch,
            step=step.step,
            token_ids=token_ids,
            logprobs=sampled.logprobs.numpy(),
            top_token_ids=sampled.top_token_ids.to(torch.int32).numpy().ravel(),
            top_logprobs=sampled.top_logprobs.numpy().ravel(),
            num_top=sampled.top_token_ids.shape[1],
        )


class OutputTransfer:
    """Takes the outputs of one step after another to the host."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
        self._turn = 0
        if not self._is_cpu:
            self._buffers = [
                torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=True) for _ in range(_NUM_BUFFERS)
            ]

    def take(self, step: StepInput, sampled: Sampled | None, prompt: Sampled | None = None) -> PendingOutput:
        """Begin to copy what `step` has sampled; log-probabilities, which are rare, are waited for here.

        `prompt`, what is to be known of prompt tokens, is on the host already.
        """
        if self._is_cpu or sampled is None:
            return PendingOutput(step, sampled, prompt, None)
        if sampled.logprobs is not None and sampled.top_token_ids is not None:
            assert sampled.top_logprobs is not None
            columns = (sampled.token_ids, sampled.logprobs, sampled.top_token_ids, sampled.top_logprobs)
            return PendingOutput(step, Sampled(*(column.cpu() for column in columns)), prompt, None)
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        here = self._buffers[self._turn][: len(sampled.token_ids)]
        here.copy_(sampled.token_ids, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(sampled.token_ids.device))
        return PendingOutput(step, Sampled(here), prompt, arrived)


def _with_prompt(output: StepOutput, prompt: Sampled) -> StepOutput:
    assert prompt.logprobs is not None
    assert prompt.top_token_ids is not None
    assert prompt.top_logprobs is not None
    return ScoredStepOutput(
        epoch=output.epoch,
        step=output.step,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        top_token_ids=output.top_token_ids,
        top_logprobs=output.top_logprobs,
        num_top=output.num_top,
        prompt_logprobs=prompt.logprobs.numpy(),
        prompt_top_token_ids=prompt.top_token_ids.to(torch.int32).numpy().ravel(),
        prompt_top_logprobs=prompt.top_logprobs.numpy().ravel(),
        num_prompt_top=prompt.top_token_ids.shape[1],
    )
