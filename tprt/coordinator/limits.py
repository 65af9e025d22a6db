"""What one engine can hold, and which requests fit into it.

Pure checks of plain values. Knows nothing of running sequences, clients or workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tprt.errors import ConfigError, InvalidRequestError
from tprt.messages import AddRequest, Int32Array, SamplingParams

# A bound, because every running sequence has a row as wide as the longest list of stop tokens.
MAX_STOP_TOKEN_IDS = 256


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the scheduler must keep to.

    Attributes:
        max_num_seqs: most sequences that run at a time.
        max_num_batched_tokens: most tokens of one step, at least `max_num_seqs`.
        max_model_len: most tokens of one sequence, prompt and output.
        block_size: tokens of one KV block.
        num_blocks: KV blocks of every rank.
        enable_prefix_caching: share the KV blocks of equal prefixes.
        schedules_ahead: start a step before the tokens of the last are back.

    Raises:
        ConfigError: a value is out of range.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool = True
    schedules_ahead: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}; expected 2 or more, a prompt token and a new one"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs"
                f" {self.max_num_seqs}; a step must hold one token of every running sequence"
            )

    @property
    def max_sequence_len(self) -> int:
        """Most tokens that one sequence can really reach.

        The last token of a sequence is never computed, so its KV needs no place.
        """
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    @property
    def max_blocks_per_seq(self) -> int:
        """Most KV blocks of one sequence."""
        return -(-(self.max_sequence_len - 1) // self.block_size)


def check_request(request: AddRequest, limits: SchedulerLimits, vocab_size: int) -> None:
    """Refuse a request that can never be served.

    Raises:
        InvalidRequestError: says what was found, what is possible and what to change.
    """
    _check_prompt_tokens(request.prompt_token_ids, vocab_size)
    # Tokens of the output that are there already are computed as those of the prompt.
    _check_prompt_length(len(request.prompt_token_ids) + len(request.output_token_ids), limits)
    _check_stop_token_ids(request.sampling, vocab_size)
    _check_logit_bias(request.sampling, vocab_size)


def _check_prompt_tokens(token_ids: Int32Array, vocab_size: int) -> None:
    if len(token_ids) == 0:
        raise InvalidRequestError("the prompt is empty; send at least one token")
    outside = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    if len(outside):
        position = int(outside[0])
        raise InvalidRequestError(
            f"prompt token {position} has id {token_ids[position]}, which is outside the vocabulary of"
            f" {vocab_size} tokens; use the tokenizer of this model"
        )


def _check_prompt_length(prompt_len: int, limits: SchedulerLimits) -> None:
    if prompt_len > limits.max_model_len - 1:
        raise InvalidRequestError(
            f"the prompt has {prompt_len} tokens, and at most {limits.max_model_len - 1} leave room for an"
            f" output within max_model_len {limits.max_model_len}; shorten the prompt or raise"
            " model.max_model_len"
        )
    if prompt_len > limits.max_sequence_len - 1:
        raise InvalidRequestError(
            f"the prompt has {prompt_len} tokens, and all {limits.num_blocks} KV blocks of"
            f" {limits.block_size} hold {limits.num_blocks * limits.block_size}; shorten the prompt or raise"
            " cache.num_blocks or cache.memory_fraction"
        )


def _check_stop_token_ids(sampling: SamplingParams, vocab_size: int) -> None:
    stop = sampling.stop_token_ids
    if len(stop) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids has {len(stop)} entries; at most {MAX_STOP_TOKEN_IDS} are possible"
        )
    for token_id in stop:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids holds {token_id}, which is outside the vocabulary of {vocab_size} tokens"
            )


def _check_logit_bias(sampling: SamplingParams, vocab_size: int) -> None:
    for token_id, _ in sampling.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token {token_id}, which is outside the vocabulary of {vocab_size} tokens"
            )
