"""Qwen3, dense."""

from typing import ClassVar

from tprt.models.decoder import DecoderForCausalLM


class Qwen3ForCausalLM(DecoderForCausalLM):
    """The decoder with a norm on every query and key head."""

    qk_norm: ClassVar[bool] = True
