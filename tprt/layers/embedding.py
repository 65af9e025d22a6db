"""Token embedding and LM head, both cut by rows of the vocabulary.

Knows nothing of sampling: the LM head gives this rank's logits and leaves them sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprt import kernels
from tprt.context import get_context
from tprt.distributed import TPGroup
from tprt.layers.packed_weight import PackedWeight, can_pack, multiply_plain
from tprt.layers.parameter import ShardedParameter, ShardSlice, sharded_parameter
from tprt.sharding import Range


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens among its `rows` of the vocabulary; the sum over ranks has them all."""

    def __init__(self, vocab_size: int, hidden_size: int, rows: Range, group: TPGroup) -> None:
        super().__init__()
        self.weight = sharded_parameter({None: ShardSlice((vocab_size, hidden_size), 0, rows)})
        self._rows = rows
        self._group = group

    def forward(self, token_ids: Tensor) -> Tensor:
        """`token_ids` `[T]` to `[T, H]`."""
        found = self._look_up_own(token_ids)
        return found if self._group.world_size == 1 else self._group.all_reduce(found)

    def _look_up_own(self, token_ids: Tensor) -> Tensor:
        """Return what this rank has, zeros for the other tokens."""
        if kernels.can_use(self.weight):
            from tprt.kernels.embedding import look_up_own

            return look_up_own(token_ids, self.weight, self._rows.start)
        if self._group.world_size == 1:
            return functional.embedding(token_ids, self.weight)
        local = token_ids - self._rows.start
        foreign = (local < 0) | (local >= self._rows.size)
        found = functional.embedding(local.masked_fill(foreign, 0), self.weight)
        return found.masked_fill_(foreign.unsqueeze(-1), 0.0)


class ParallelLMHead(nn.Module):
    """Logits of this rank's `rows` of the vocabulary, for the tokens that are to be continued.

    With tied embeddings `weight` is the embedding's.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, rows: Range, tied_to: VocabParallelEmbedding | None
    ) -> None:
        super().__init__()
        self.weight: ShardedParameter
        if tied_to is None:
            self.weight = sharded_parameter({None: ShardSlice((vocab_size, hidden_size), 0, rows)})
        else:
            self.weight = tied_to.weight
        self._packed: PackedWeight | None = None

    def process_weights_after_loading(self) -> None:
        """Pack a copy of the weight where that is faster; the embedding still reads the plain one."""
        if can_pack(self.weight):
            self._packed = PackedWeight(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` `[T, H]` to logits `[S, v]`, one row for each sequence that is to be sampled."""
        chosen = hidden if (indices := _logits_indices(hidden)) is None else hidden[indices]
        if self._packed is not None:
            return self._packed.multiply(chosen)
        return multiply_plain(chosen, self.weight)


def _logits_indices(hidden: Tensor) -> Tensor | None:
    context = get_context()
    if context.logits_indices is not None:
        return context.logits_indices
    if not context.is_prefill:
        return None
    assert context.cu_seqlens_q is not None
    return (context.cu_seqlens_q[1:] - 1).to(device=hidden.device, dtype=torch.int64)
