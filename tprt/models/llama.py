"""Llama 2 and 3, and every checkpoint that says `LlamaForCausalLM` (SmolLM2 among them)."""

from tprt.models.decoder import DecoderForCausalLM


class LlamaForCausalLM(DecoderForCausalLM):
    """The decoder as it is."""
