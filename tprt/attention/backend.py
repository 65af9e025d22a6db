"""The interface of every attention backend.

Knows nothing of projections, positions or models: queries, keys and values come in, rotated already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from tprt.context import Context
from tprt.kernels.preparation import Preparation


class AttentionBackend(ABC):
    """Computes attention for one device. One object serves all layers of a model."""

    name: ClassVar[str]
    capturable: ClassVar[bool]
    """Whether `write_kv` and `decode` may be captured in a CUDA graph: they never wait for the device and do
    the same whatever the tensors hold. Such a backend takes padding: tokens with a slot of -1 are not written,
    and a sequence whose entry in `context_lens` is 0 gets any finite result."""

    @abstractmethod
    def write_kv(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Store `key` and `value` `[T, kv, D]` in `kv_cache` `[2, N, block_size, kv, D]` at their slots."""

    @abstractmethod
    def prefill(self, qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context) -> Tensor:
        """Attend causally over the ragged batch that `cu_seqlens_q` and `cu_seqlens_k` describe.

        With `block_tables` keys and values are read from the cache (where `write_kv` has put this step's);
        without, from `qkv` itself. Queries are the last tokens of their sequence.

        Args:
            qkv: queries `[T, h, D]`, keys and values `[T, kv, D]`.
            kv_cache: `[2, N, block_size, kv, D]`.
            context: of this batch.

        Returns:
            `[T, h, D]`.
        """

    @abstractmethod
    def decode(self, query: Tensor, kv_cache: Tensor, context: Context) -> Tensor:
        """Attend with one query token for each sequence, `[S, h, D]`, over its `context_lens` tokens."""

    def prepares(self, num_seqs: int, kv_cache: Tensor) -> bool:
        """Tell whether a step of `num_seqs` decodes over `kv_cache` is for `prepare_and_decode`."""
        return False

    def prepare_and_decode(self, heads: Tensor, how: Preparation, kv_cache: Tensor, context: Context) -> Tensor:
        """Do all between projection and output of a step of decodes: prepare, store keys and values, attend.

        Tokens go to the slots that `block_tables` and `context_lens` say; those of `slot_mapping` are the same.

        Args:
            heads: as projected, `[S, h + 2 kv, D]`, a token's end to end.
            how: what `heads` become before they attend.
            kv_cache: `[2, N, block_size, kv, D]`.
            context: of this batch.

        Returns:
            `[S, h, D]`.
        """
        raise NotImplementedError(f"{self.name} takes queries that are prepared")
