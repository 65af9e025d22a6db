"""Attention over paged KV blocks: one interface, several backends, chosen by name or by device."""

from tprt.attention.backend import AttentionBackend
from tprt.attention.registry import make_attention_backend

__all__ = ["AttentionBackend", "make_attention_backend"]
