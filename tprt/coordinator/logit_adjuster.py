"""What is done to the logits of one sequence before a token is chosen: biases, penalties, a grammar.

Built once from a request's sampling parameters, and brought up to date from the tokens that the sequence has,
so that it agrees with them also after a preemption or with new ranks. Knows nothing of rows, steps and workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tprt.coordinator.grammar import GrammarCompiler, GrammarState, forbid_tokens
from tprt.coordinator.token_counts import TokenCounts
from tprt.errors import InvalidRequestError
from tprt.messages import AddRequest, Float32Array, Int32Array, SamplingParams

Biases = tuple[Int32Array, Float32Array]


class LogitAdjuster:
    """The adjustments of one sequence.

    Attributes:
        counts: of the tokens to be penalised; None when nothing is.
        penalties: presence, frequency and repetition.
        grammar: where the output is in its grammar, if it has one.
        needs_newest: what is done depends on which tokens the sequence has, and not on their number alone.
    """

    def __init__(
        self, request: AddRequest, eos_token_ids: tuple[int, ...], grammar: GrammarState | None
    ) -> None:
        sampling, prompt = request.sampling, request.prompt_token_ids
        self.penalties = (
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
        )
        self.counts: TokenCounts | None = None
        if self.penalties != (0.0, 0.0, 1.0):
            self.counts = TokenCounts(prompt if sampling.repetition_penalty != 1.0 else None)
        self.grammar = grammar
        self.needs_newest = self.counts is not None or grammar is not None
        self._num_taken = len(prompt)
        # Fewer tokens than this, prompt and output, and the output may not end.
        self._min_len = len(prompt) + sampling.min_tokens
        self._end_ids = np.array(sorted({*eos_token_ids, *sampling.stop_token_ids}), np.int32)
        biases = dict(sampling.logit_bias)
        self._biases = _to_biases(biases)
        self._early_biases = _to_biases(biases | dict.fromkeys(self._end_ids.tolist(), -math.inf))

    def take(self, token_ids: Int32Array) -> None:
        """Take in what is new in `token_ids` `[n]`, prompt and output, all of them known."""
        assert self._num_taken <= len(token_ids), "tokens that were taken in are gone"
        new = token_ids[self._num_taken :].tolist()
        self._num_taken = len(token_ids)
        if self.counts is not None:
            self.counts.take(new)
        if self.grammar is not None:
            self.grammar.take(new)

    def biases(self, num_tokens: int) -> Biases:
        """Return which logits get something added, and what, for the token after `num_tokens`."""
        # With a grammar the mask says that the output may not end yet, see `restrict`.
        is_early = num_tokens < self._min_len and self.grammar is None
        return self._early_biases if is_early else self._biases

    def restrict(self, mask: Int32Array, num_tokens: int) -> None:
        """Take what may not come yet out of a grammar's mask `[W]`; a grammar that ends counts more."""
        if num_tokens < self._min_len:
            forbid_tokens(mask, self._end_ids)


def make_adjuster(
    request: AddRequest, eos_token_ids: tuple[int, ...], grammars: GrammarCompiler | None
) -> LogitAdjuster | None:
    """Return what `request` wants done to its logits, None when it is nothing.

    Raises:
        InvalidRequestError: its grammar cannot be used.
    """
    sampling = request.sampling
    if sampling.grammar is not None:
        if grammars is None:
            raise InvalidRequestError("this engine has no tokenizer, and a grammar needs one")
        return LogitAdjuster(request, eos_token_ids, grammars.start(sampling.grammar))
    return LogitAdjuster(request, eos_token_ids, None) if _adjusts(sampling) else None


def _adjusts(sampling: SamplingParams) -> bool:
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    return bool(sampling.logit_bias or sampling.min_tokens) or penalties != (0.0, 0.0, 1.0)


def _to_biases(values: Mapping[int, float]) -> Biases:
    return np.array(list(values), np.int32), np.array(list(values.values()), np.float32)
