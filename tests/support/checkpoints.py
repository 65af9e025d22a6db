"""Tiny random checkpoints, written by transformers itself, so that it is both the source and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

_CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class TinyModel:
    """The shape of a tiny checkpoint."""

    architecture: str = "llama"
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 112
    vocab_size: int = 199
    layers: int = 2
    bias: bool = False
    tied: bool = False
    stretched: bool = False
    """Whether positions are stretched by the Llama 3.1 rule."""

    def __str__(self) -> str:
        extras = "".join(f"-{name}" for name in ("bias", "tied", "stretched") if getattr(self, name))
        return f"{self.architecture}-{self.heads}q{self.kv_heads}kv{extras}"


def save_tiny(folder: Path, tiny: TinyModel, shard_size: str = "5GB") -> PreTrainedModel:
    """Write a random checkpoint of that shape into `folder`; return transformers' own model of it."""
    config_class, model_class = _CLASSES[tiny.architecture]
    settings: dict[str, object] = {"mlp_bias": tiny.bias} if tiny.architecture == "llama" else {}
    if tiny.stretched:
        settings["rope_parameters"] = _LLAMA3_ROPE
    config = config_class(
        hidden_size=8 * tiny.heads,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.kv_heads,
        head_dim=tiny.head_dim,
        vocab_size=tiny.vocab_size,
        max_position_embeddings=256,
        attention_bias=tiny.bias,
        tie_word_embeddings=tiny.tied,
        eos_token_id=0,
        bos_token_id=1,
        **settings,
    )
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts with biases of 0 and norms of 1, which would hide a wrong one
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return transformers' logits `[T, V]` of one sequence."""
    logits: torch.Tensor = model(torch.tensor([token_ids], device=model.device)).logits[0]
    return logits


@torch.no_grad()
def reference_tokens(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Return `count` greedy tokens of transformers' `generate`, end-of-sequence tokens ignored."""
    prompt_ids = torch.tensor([prompt], device=model.device)
    result = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = result[0, len(prompt) :].tolist()
    return tokens
