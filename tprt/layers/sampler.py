"""Choosing the next tokens from logits that are sharded over the vocabulary.

Greedy and plain random sampling exchange one candidate per rank and sequence, which is exact: with noise
from Gumbel's distribution added, the largest logit of all is a draw from the softmax (Gumbel 1954; Maddison
et al. 2014, arXiv:1411.0030), and a maximum over ranks is a maximum over the vocabulary. Truncated sampling
and log-probabilities need the whole row and gather it.

Noise is a function of (seed, position, token id) alone, so a request draws the same tokens whatever else is
in the batch, on any number of ranks, and when it is computed again. Every rank ends with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tprt import kernels
from tprt.distributed import TPGroup
from tprt.layers.logit_adjustments import LogitAdjustments
from tprt.layers.noise import gumbel_noise
from tprt.sharding import Range


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of the `n` sequences that are sampled in a step.

    Attributes:
        temperatures, top_ps, min_ps: `[n]` float32.
        top_ks: `[n]` int64; 0 keeps all tokens.
        noise_keys: `[n]` int64, one per (seed, position); 0 where nothing is random.
        num_top: most likely tokens to report for each sequence; None when no log-probabilities are wanted.
        any_random: some temperature is above 0.
        any_truncated: some sequence uses top-k, top-p or min-p.
        adjustments: what is done to the logits before; on all ranks something or on none.
    """

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    noise_keys: Tensor
    num_top: int | None
    any_random: bool
    any_truncated: bool
    adjustments: LogitAdjustments | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """`token_ids` `[n]`; with log-probabilities asked for, `logprobs` `[n]` and `[n, num_top]` best tokens."""

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_token_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


class Sampler(nn.Module):
    """Samples on every rank alike; `vocab_rows[r]` is what rank r's logits cover."""

    def __init__(self, group: TPGroup, vocab_rows: Sequence[Range]) -> None:
        super().__init__()
        self._group = group
        self._sizes = [rows.size for rows in vocab_rows]
        self._start = vocab_rows[group.rank].start

    def forward(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """Choose from `logits` `[n, v]` of this rank's rows.

        Log-probabilities are those of the model: of logits as they come, without temperature, biases, penalties
        and grammars (the default of vLLM, and what OpenAI's API reports).
        """
        if not kernels.can_use(logits):
            logits = logits.float()
        if batch.adjustments is not None:
            # What is chosen from is gone before log-probabilities are made: each is as large as all logits.
            token_ids = self._choose_from(batch.adjustments.apply(logits), batch)
            if batch.num_top is None:
                return Sampled(token_ids)
            return _with_logprobs(self._gather(logits).float(), token_ids, batch.num_top)
        if batch.num_top is None:
            return Sampled(self._choose_from(logits, batch))
        full = self._gather(logits)
        return _with_logprobs(full.float(), _choose(full, batch), batch.num_top)

    def score(self, logits: Tensor, token_ids: Tensor, num_top: int) -> Sampled:
        """Return the log-probabilities of given `token_ids` `[n]`; `logits` are `[n, v]` as in `forward`."""
        return _with_logprobs(self._gather(logits).float(), token_ids, num_top)

    def _choose_from(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Return the tokens `[n]`; no more than candidates are exchanged where that is enough."""
        if batch.any_truncated:
            return _choose(self._gather(logits), batch)
        return self._from_candidates(logits, batch)

    def _gather(self, logits: Tensor) -> Tensor:
        return self._group.all_gather(logits, self._sizes)

    def _from_candidates(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Return the token of the best of all ranks' candidates; the lowest id wins a tie."""
        if self._group.world_size == 1:
            return _choose(logits, batch)
        gathered = self._group.all_gather(_candidates(logits, batch, self._start), [2] * self._group.world_size)
        ranks = gathered.view(-1, self._group.world_size, 2)
        winner = ranks[..., 0].argmax(dim=-1, keepdim=True)
        return ranks[..., 1].gather(1, winner).squeeze(1).long()


def _choose(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the tokens `[n]` drawn from whole rows."""
    if kernels.can_use(logits):
        return _sample_by_kernel(logits, batch, 0, as_candidates=False)
    kept = _truncated(logits, batch) if batch.any_truncated else logits
    return _perturbed(kept, batch, 0).argmax(dim=-1)


def _candidates(logits: Tensor, batch: SamplingBatch, first_id: int) -> Tensor:
    """Return the best score and its token of each row, `[n, 2]`.

    float64 holds a float32 score and a token id exactly, so one exchange carries both.
    """
    if kernels.can_use(logits):
        return _sample_by_kernel(logits, batch, first_id, as_candidates=True)
    best, index = _perturbed(logits, batch, first_id).max(dim=-1)
    return torch.stack([best.double(), (index + first_id).double()], dim=-1)


def _sample_by_kernel(logits: Tensor, batch: SamplingBatch, first_id: int, as_candidates: bool) -> Tensor:
    from tprt.kernels.sampling import sample_tokens
    from tprt.kernels.truncation import truncation_floors

    logits, floors = logits.contiguous(), None
    if batch.any_truncated:
        floors = truncation_floors(logits, batch.temperatures, batch.top_ks, batch.top_ps, batch.min_ps)
    draw = (batch.temperatures, batch.noise_keys) if batch.any_random else None
    return sample_tokens(logits, first_id, draw, floors, as_candidates)


def _perturbed(logits: Tensor, batch: SamplingBatch, first_id: int) -> Tensor:
    """Multiply by the inverse temperature and add noise, but leave greedy rows as they are."""
    if not batch.any_random:
        return logits
    if logits.device.type != "cpu":
        # Choosing the rows would wait for the device.
        noise = gumbel_noise(batch.noise_keys, first_id, logits.shape[-1])
        scores = logits * _inverse(batch.temperatures) + noise
        return torch.where(batch.temperatures.unsqueeze(1) > 0, scores, logits)
    random_rows = batch.temperatures.nonzero().squeeze(1)
    noise = gumbel_noise(batch.noise_keys[random_rows], first_id, logits.shape[-1])
    scores = logits[random_rows] * _inverse(batch.temperatures[random_rows]) + noise
    return logits.index_copy(0, random_rows, scores)


def _truncated(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Set what min-p, top-k and top-p exclude to minus infinity, in this order, after the temperature.

    Tokens as likely as the last one that is kept are kept, and the most likely one always stays. Top-p is
    nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751).
    """
    ordered = logits.sort(dim=-1, descending=True).values
    probs = (ordered * _inverse(batch.temperatures)).softmax(dim=-1)
    size = logits.shape[-1]
    last = torch.where(batch.top_ks > 0, batch.top_ks.clamp(max=size), size).unsqueeze(1) - 1
    kept = (probs >= batch.min_ps.unsqueeze(1) * probs[:, :1]) & (ordered >= ordered.gather(1, last))
    probs = probs.masked_fill(~kept, 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    top_ps = batch.top_ps.unsqueeze(1)
    # Sums are rounded: they may reach 1 before the last token.
    kept &= (probs.cumsum(dim=-1) - probs < top_ps) | (top_ps >= 1)
    kept[:, 0] = True
    floor = ordered.masked_fill(~kept, float("inf")).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < floor, float("-inf"))


def _inverse(temperatures: Tensor) -> Tensor:
    """Return 1 / temperature `[n, 1]`, and 1 for greedy rows."""
    return (1.0 / temperatures.where(temperatures > 0, torch.ones_like(temperatures))).unsqueeze(1)


def _with_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Sampled:
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(num_top, dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return Sampled(token_ids, chosen, top.indices, top.values)
