"""Steps whose logits are adjusted, made from what each sequence wants and without the coordinator's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tprt.messages import StepInput


@dataclass(frozen=True)
class SequenceWishes:
    """What one sequence wants; `allowed` tokens are those of a grammar."""

    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    allowed: set[int] | None = None

    @property
    def penalised(self) -> dict[int, int]:
        """Return how often each token to be penalised is in the output."""
        if (self.presence, self.frequency, self.repetition) == (0.0, 0.0, 1.0):
            return {}
        return dict.fromkeys(self.prompt, 0) | Counter(self.output)


def make_adjusted_step(wishes: Sequence[SequenceWishes], vocab_size: int, **columns: object) -> StepInput:
    """Return a step of decodes, one for each of `wishes`."""
    n = len(wishes)
    ones = np.ones(n, np.int32)
    penalised = [wish.penalised for wish in wishes]
    restricted = [row for row, wish in enumerate(wishes) if wish.allowed is not None]
    values: dict[str, object] = {
        "epoch": 0,
        "step": 0,
        "num_decodes": n,
        "seq_slots": np.arange(n, dtype=np.int32),
        "query_lens": ones,
        "context_lens": ones,
        "token_ids": ones,
        "block_ids": ones,
        "samples": np.ones(n, np.uint8),
        "temperatures": np.zeros(n, np.float32),
        "top_ks": np.zeros(n, np.int32),
        "top_ps": np.ones(n, np.float32),
        "min_ps": np.zeros(n, np.float32),
        "seeds": np.zeros(n, np.int64),
        "num_logprobs": -ones,
        "bias_counts": np.array([len(wish.bias) for wish in wishes], np.int32),
        "bias_token_ids": np.array([token_id for wish in wishes for token_id in wish.bias], np.int32),
        "bias_values": np.array([bias for wish in wishes for bias in wish.bias.values()], np.float32),
        "penalty_counts": np.array([len(tokens) for tokens in penalised], np.int32),
        "penalty_token_ids": np.array([token_id for tokens in penalised for token_id in tokens], np.int32),
        "penalty_output_counts": np.array([n for tokens in penalised for n in tokens.values()], np.int32),
        "presence_penalties": np.array([wish.presence for wish in wishes], np.float32),
        "frequency_penalties": np.array([wish.frequency for wish in wishes], np.float32),
        "repetition_penalties": np.array([wish.repetition for wish in wishes], np.float32),
        "grammar_rows": np.array(restricted, np.int32),
        "token_masks": _pack([wishes[row].allowed or set() for row in restricted], vocab_size),
    }
    return StepInput(**(values | columns))  # type: ignore[arg-type]


def _pack(allowed: Sequence[set[int]], vocab_size: int) -> np.ndarray:
    masks = np.zeros((len(allowed), -(-vocab_size // 32)), np.int64)
    for mask, token_ids in zip(masks, allowed, strict=True):
        for token_id in token_ids:
            mask[token_id // 32] |= 1 << token_id % 32
    return masks.astype(np.uint32).view(np.int32).ravel()
