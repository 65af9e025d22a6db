"""The models that tprt runs. A new dense model is one file, one registry line and one test parameter."""

from tprt.models.decoder import DecoderForCausalLM, ModelParts
from tprt.models.registry import build_model, supported_architectures

__all__ = ["DecoderForCausalLM", "ModelParts", "build_model", "supported_architectures"]
