"""From a request to the sequence that waits for its turn. Knows nothing of queues and running sequences."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from tprt.coordinator.grammar import GrammarCompiler
from tprt.coordinator.limits import SchedulerLimits, check_request
from tprt.coordinator.logit_adjuster import make_adjuster
from tprt.coordinator.sequence import Sequence
from tprt.messages import AddRequest


class Intake:
    """Makes the sequences of one engine."""

    def __init__(
        self,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        draw_seed: Callable[[], int],
        grammars: GrammarCompiler | None,
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._draw_seed = draw_seed
        self._grammars = grammars

    def make_sequence(
        self, key: Hashable, request: AddRequest, arrived_ns: int, limits: SchedulerLimits
    ) -> Sequence:
        """Return the sequence of `request`, which came at `arrived_ns` and is called `key`.

        Raises:
            InvalidRequestError: it could never be served within `limits`, or its grammar cannot be used.
        """
        check_request(request, limits, self._vocab_size)
        sampling, prompt, output = request.sampling, request.prompt_token_ids, request.output_token_ids
        return Sequence(
            key=key,
            request_id=request.request_id,
            sampling=sampling,
            seed=self._draw_seed() if sampling.seed is None else sampling.seed,
            prompt_len=len(prompt),
            token_ids=np.concatenate([prompt, output]) if len(output) else prompt,
            arrived_ns=arrived_ns,
            adjuster=make_adjuster(request, self._eos_token_ids, self._grammars),
            # Whoever has tokens of the output has been told of the whole prompt before.
            num_scored=len(prompt) - 1 if len(output) else 0,
        )
