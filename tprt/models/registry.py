"""Architectures by the name that config.json gives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tprt.errors import UnsupportedModelError
from tprt.models.decoder import DecoderForCausalLM, ModelParts
from tprt.models.llama import LlamaForCausalLM
from tprt.models.qwen3 import Qwen3ForCausalLM

_ARCHITECTURES: dict[str, type[DecoderForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def supported_architectures() -> list[str]:
    """Return the names that `build_model` knows."""
    return sorted(_ARCHITECTURES)


def build_model(parts: ModelParts, dtype: torch.dtype, device: torch.device) -> DecoderForCausalLM:
    """Allocate this rank's part of the model, not yet filled.

    Raises:
        UnsupportedModelError: the architecture is not known; the message lists those that are.
    """
    architecture = parts.config.architecture
    if architecture not in _ARCHITECTURES:
        known = ", ".join(supported_architectures())
        raise UnsupportedModelError(f"config.json names {architecture!r}; tprt runs {known}")
    with _default_dtype(dtype), device:
        return _ARCHITECTURES[architecture](parts).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
