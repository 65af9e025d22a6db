"""Shapes of models by name, and what a checkpoint of a shape holds: its tensors and its config.json.

Knows nothing of the values of tensors and of files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tprt.errors import ConfigError

Architecture = Literal["Qwen3ForCausalLM", "LlamaForCausalLM"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides the tensors of a dense decoder; the names are those of config.json.

    Attributes:
        bias: whether the attention projections have a bias, and with Llama those of the MLP too.
        rope_factor: how far Llama's rule stretches positions; None: not at all.

    Raises:
        ConfigError: no model has such a shape.
    """

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    bias: bool = False
    rope_factor: float | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        wrong = [f"{name} is {size}" for name, size in sizes.items() if size < 1]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}; expected 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key/value"
                " heads evenly; change one of them"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; the rotary embedding needs an even number")


_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> ModelShape:
    return ModelShape(
        architecture="Qwen3ForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
    )


def _llama3(
    hidden: int, intermediate: int, layers: int, heads: int, head_dim: int = 128, factor: float = 8.0
) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        # the small ones of Llama 3.2 are tied, and stretch positions further
        tie_word_embeddings=factor > 8.0,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_factor=factor,
    )


SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, head_dim=64, factor=32.0),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, factor=32.0),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64),
    "smollm2-135m": ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
    ),
}


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name every tensor of the checkpoint, with its shape, layer after layer."""
    embedding = (shape.vocab_size, shape.hidden_size)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding}
    for layer in range(shape.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}": size for name, size in _layer_tensors(shape).items()}
    tensors["model.norm.weight"] = (shape.hidden_size,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = embedding
    return tensors


def num_elements(shape: ModelShape) -> tuple[int, int]:
    """Return how many numbers one layer has, and how many everything else."""
    layer = sum(math.prod(size) for size in _layer_tensors(shape).values())
    embeddings = 1 if shape.tie_word_embeddings else 2
    return layer, (embeddings * shape.vocab_size + 1) * shape.hidden_size


def config_json(shape: ModelShape, dtype: str) -> dict[str, Any]:
    """Return config.json as transformers 5 writes it."""
    is_llama = shape.architecture == "LlamaForCausalLM"
    rope: dict[str, Any] = {"rope_theta": shape.rope_theta, "rope_type": "default"}
    if shape.rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": shape.rope_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": [shape.architecture],
        "model_type": "llama" if is_llama else "qwen3",
        **{name: getattr(shape, name) for name in _SIZES},
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": shape.bias,
        "attention_dropout": 0.0,
        **({"mlp_bias": shape.bias} if is_llama else {}),
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }


def _layer_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, channels = shape.hidden_size, shape.intermediate_size
    q_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    is_llama = shape.architecture == "LlamaForCausalLM"
    attention = {"q_proj": (q_rows, hidden), "k_proj": (kv_rows, hidden), "v_proj": (kv_rows, hidden)}
    attention["o_proj"] = (hidden, q_rows)
    mlp = {"gate_proj": (channels, hidden), "up_proj": (channels, hidden), "down_proj": (hidden, channels)}
    tensors: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    tensors |= _linear("self_attn", attention, shape.bias)
    if not is_llama:
        tensors |= {f"self_attn.{name}.weight": (shape.head_dim,) for name in ("q_norm", "k_norm")}
    tensors["post_attention_layernorm.weight"] = (hidden,)
    return tensors | _linear("mlp", mlp, shape.bias and is_llama)


def _linear(prefix: str, weights: dict[str, tuple[int, int]], bias: bool) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {}
    for name, size in weights.items():
        tensors[f"{prefix}.{name}.weight"] = size
        if bias:
            tensors[f"{prefix}.{name}.bias"] = size[:1]
    return tensors
