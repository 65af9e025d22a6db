"""The process-local context of one forward pass: what the scheduler decided, for attention and LM head.

`set_context` before the forward, `get_context` inside it, `reset_context` after it. It is the one
module-level state that tprt has. Knows nothing of sequences, requests or devices.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """Metadata of the batch that is being computed; `T` tokens of `S` sequences.

    A batch is either all decodes (`is_prefill` False: one query token for each sequence) or holds prefill
    chunks (`is_prefill` True). A mixed batch is a prefill whose first `num_decodes` sequences have one
    query token each; `context_lens` then covers those leading sequences only.

    Attributes:
        is_prefill: True when any sequence brings a prompt chunk.
        cu_seqlens_q: `[S + 1]` int32, running sum of query tokens; prefill only.
        cu_seqlens_k: `[S + 1]` int32, running sum of KV tokens, cached ones included; prefill only.
        max_seqlen_q: longest query of the batch, in tokens; prefill only.
        max_seqlen_k: longest KV length of the batch, in tokens.
        slot_mapping: `[T]` int64, KV slot (`block * block_size + offset`) that each token is written to.
        context_lens: `[S]` (mixed: `[num_decodes]`) int32, KV tokens of each decode, this step's included.
        block_tables: `[S, B]` int32, KV blocks of each sequence, padded with 0; None when a prefill
            attends to nothing but its own tokens.
        num_decodes: leading sequences of a mixed batch that are decodes.
        logits_indices: `[S']` int64, the tokens whose logits are wanted; None means the last token of
            every sequence.
    """

    is_prefill: bool = False
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    slot_mapping: Tensor | None = None
    context_lens: Tensor | None = None
    block_tables: Tensor | None = None
    num_decodes: int = 0
    logits_indices: Tensor | None = None


_EMPTY = Context()
# A context variable: ranks that are threads of one process, as in tests, each see their own.
_context: ContextVar[Context] = ContextVar("tprt_context", default=_EMPTY)


def get_context() -> Context:
    """Return the context of the forward pass under way, or an empty one outside of it."""
    return _context.get()


def set_context(context: Context) -> None:
    """Make `context` the one that attention and LM head see."""
    _context.set(context)


def reset_context() -> None:
    """Forget the context, and with it the references to its tensors."""
    _context.set(_EMPTY)
