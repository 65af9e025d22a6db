"""Attention over paged KV blocks: one interface, several backends, chosen by name or by device."""

from tprt.attention.backend import AttentionBackend
from tprt.attention.registry import make_attention_backend
from tprt.attention.requirements import AttentionSetup

__all__ = ["AttentionBackend", "AttentionSetup", "make_attention_backend"]
