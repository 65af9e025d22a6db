"""What is done to logits before tokens are chosen from them: biases, penalties, and masks of grammars.

Each rank changes the logits of its own part of the vocabulary, so nothing is exchanged, and nothing waits for
the device. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of masks that are unpacked at a time: three bytes for each logit.
_MASKS_AT_A_TIME = 32


@dataclass(frozen=True, slots=True)
class LogitAdjustments:
    """The adjustments of one step to a rank's logits `[n, v]`; no place is named twice in one column.

    Attributes:
        bias_places: `[b]` int64, row times `v` plus column.
        bias_values: `[b]` float32, added; minus infinity forbids a token.
        penalty_places: `[p]` int64, as above.
        divisors: `[p]` float32, repetition penalties: positive logits are divided by them, others multiplied.
        subtrahends: `[p]` float32, what presence and frequency penalties take off after that.
        mask_rows: `[g]` int64, rows whose tokens a grammar restricts.
        masks: `[g, B]` uint8, a bit for each token, the lowest of a byte first; 1 where it is possible.
        first_bit: the bit of column 0.
    """

    bias_places: Tensor
    bias_values: Tensor
    penalty_places: Tensor
    divisors: Tensor
    subtrahends: Tensor
    mask_rows: Tensor
    masks: Tensor
    first_bit: int

    def apply(self, logits: Tensor) -> Tensor:
        """Return adjusted logits `[n, v]` in float32; `logits` stay as they are.

        Biases come first, then penalties, repetition before the others, as in vLLM.
        """
        adjusted = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat = adjusted.view(-1)
        if len(self.bias_places):
            flat[self.bias_places] += self.bias_values
        if len(self.penalty_places):
            flat[self.penalty_places] = self._penalised(flat[self.penalty_places])
        for start in range(0, len(self.mask_rows), _MASKS_AT_A_TIME):
            rows = self.mask_rows[start : start + _MASKS_AT_A_TIME]
            possible = self._unpacked(self.masks[start : start + _MASKS_AT_A_TIME], logits.shape[1])
            adjusted[rows] = adjusted[rows].masked_fill_(possible == 0, float("-inf"))
        return adjusted

    def _penalised(self, logits: Tensor) -> Tensor:
        return torch.where(logits > 0, logits / self.divisors, logits * self.divisors) - self.subtrahends

    def _unpacked(self, masks: Tensor, width: int) -> Tensor:
        """Return a byte for each column, `[g, width]`, not 0 where the token is possible."""
        bits = torch.arange(8, dtype=torch.uint8, device=masks.device)
        unpacked = (masks.unsqueeze(-1) >> bits) & 1
        return unpacked.view(len(masks), -1)[:, self.first_bit : self.first_bit + width]
