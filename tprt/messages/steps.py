"""Coordinator to ranks and back: one scheduled batch, and what it sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from tprt.messages.arrays import NO_FLOAT32, NO_INT32, Float32Array, Int32Array, Int64Array, UInt8Array


@dataclass(frozen=True, slots=True)
class StepInput:
    """Coordinator to workers: one scheduled batch of `S` sequences with `T` query tokens in all.

    Complete: a worker needs its weights, its KV blocks and the tokens it sampled last, nothing else.
    Decodes (one query token, sampled) come first.

    Attributes:
        epoch: the worker group that this step is for.
        step: sequence number; the first one of an epoch is 0.
        num_decodes: leading sequences that are decodes.
        seq_slots: `[S]` place of each sequence among the running ones, stable while it runs.
        query_lens: `[S]` tokens of each sequence in this step.
        context_lens: `[S]` KV tokens of each sequence after this step.
        token_ids: `[T]` input tokens; -1 stands for the token that the worker sampled last for that slot.
        block_ids: the block table of each sequence, `ceil(context_lens / block_size)` ids, end to end.
        samples: `[S]` 1 where a token is to be sampled from the sequence's last position.
        temperatures, top_ks, top_ps, min_ps, seeds, num_logprobs: `[S]` sampling parameters;
            `num_logprobs` is -1 where none are wanted.
        bias_counts, bias_token_ids, bias_values: `[S]` how many logits of each sequence have something added to
            them, and end to end which and what; minus infinity forbids a token.
        penalty_counts, penalty_token_ids, penalty_output_counts: `[S]` how many tokens of each sequence are
            penalised, and end to end which, and how often each is in the output (0: in the prompt only).
        presence_penalties, frequency_penalties, repetition_penalties: `[S]` as in `SamplingParams`.
        grammar_rows, token_masks: `[G]` sequences whose next token a grammar restricts, and `[G * W]` a bit for
            each token of the vocabulary, the lowest of a word first: 1 where it is possible.
        prompt_rows, prompt_row_targets: `[R]` which of the `T` tokens, in rising order, stand before a prompt
            token whose log-probability is wanted, and that token. No decode is among them.
        num_prompt_top: most likely tokens to report at each of those places.

    The columns of biases, of penalties, of grammars and of prompt rows are empty where no sequence of the step
    needs any.
    """

    epoch: int
    step: int
    num_decodes: int
    seq_slots: Int32Array
    query_lens: Int32Array
    context_lens: Int32Array
    token_ids: Int32Array
    block_ids: Int32Array
    samples: UInt8Array
    temperatures: Float32Array
    top_ks: Int32Array
    top_ps: Float32Array
    min_ps: Float32Array
    seeds: Int64Array
    num_logprobs: Int32Array
    bias_counts: Int32Array = field(default_factory=lambda: NO_INT32)
    bias_token_ids: Int32Array = field(default_factory=lambda: NO_INT32)
    bias_values: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    penalty_counts: Int32Array = field(default_factory=lambda: NO_INT32)
    penalty_token_ids: Int32Array = field(default_factory=lambda: NO_INT32)
    penalty_output_counts: Int32Array = field(default_factory=lambda: NO_INT32)
    presence_penalties: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    frequency_penalties: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    repetition_penalties: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    grammar_rows: Int32Array = field(default_factory=lambda: NO_INT32)
    token_masks: Int32Array = field(default_factory=lambda: NO_INT32)
    prompt_rows: Int32Array = field(default_factory=lambda: NO_INT32)
    prompt_row_targets: Int32Array = field(default_factory=lambda: NO_INT32)
    num_prompt_top: int = 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything is to be done to the logits of a sequence before a token is chosen."""
        return bool(len(self.bias_counts) or len(self.penalty_counts) or len(self.grammar_rows))


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Rank 0 to coordinator: what one step sampled, in the order of `StepInput` sequences with `samples` 1.

    Attributes:
        token_ids: `[n]` sampled tokens.
        logprobs: `[n]` their log-probabilities, or empty when no sequence wants any.
        top_token_ids, top_logprobs: `[n * num_top]` most likely tokens, best first.
        num_top: entries per sequence in the two arrays above.
    """

    epoch: int
    step: int
    token_ids: Int32Array
    logprobs: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    top_token_ids: Int32Array = field(default_factory=lambda: NO_INT32)
    top_logprobs: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    num_top: int = 0


@dataclass(frozen=True, slots=True)
class ScoredStepOutput(StepOutput):
    """The output of a step with prompt rows; a type of its own, so that all others carry nothing for it.

    Attributes:
        prompt_logprobs: `[R]` log-probabilities of `StepInput.prompt_row_targets`.
        prompt_top_token_ids, prompt_top_logprobs: `[R * num_prompt_top]` most likely tokens there, best first.
        num_prompt_top: as in `StepInput`.
    """

    prompt_logprobs: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    prompt_top_token_ids: Int32Array = field(default_factory=lambda: NO_INT32)
    prompt_top_logprobs: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    num_prompt_top: int = 0
