"""Checkpoints of every layout, written without a model library, and what each rank must hold of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from tprt.attention import make_attention_backend
from tprt.checkpoint_config import read_checkpoint_config
from tprt.distributed import TPGroup
from tprt.models import DecoderForCausalLM, ModelParts, build_model
from tprt.sharding import Range, RankShard, ShardPlan

QWEN3_600M = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "eos_token_id": 151645,
}
"""The config.json of Qwen3-0.6B, for tests that need no weights of it."""


@dataclass(frozen=True)
class Layout:
    """A checkpoint: its model, its type, and how its bytes lie in files."""

    kv_heads: int
    group: int
    head_dim: int = 4
    intermediate_size: int = 40
    vocab_size: int = 67
    num_layers: int = 2
    is_qwen3: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    num_files: int = 1
    odd_header: bool = False
    hidden_size: int = 24

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3ForCausalLM" if self.is_qwen3 else "LlamaForCausalLM"],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.kv_heads * self.group,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "torch_dtype": "float32",
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, size = self.hidden_size, self.head_dim
        q, kv = self.kv_heads * self.group * size, self.kv_heads * size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, out, into in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
                yield f"{prefix}self_attn.{name}_proj.weight", (out, into)
                if self.attention_bias:
                    yield f"{prefix}self_attn.{name}_proj.bias", (out,)
            if self.is_qwen3:
                yield f"{prefix}self_attn.q_norm.weight", (size,)
                yield f"{prefix}self_attn.k_norm.weight", (size,)
            channels = self.intermediate_size
            for name, out, into in (
                ("gate", channels, hidden),
                ("up", channels, hidden),
                ("down", hidden, channels),
            ):
                yield f"{prefix}mlp.{name}_proj.weight", (out, into)
                if self.mlp_bias:
                    yield f"{prefix}mlp.{name}_proj.bias", (out,)
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def write(self, folder: Path) -> dict[str, Tensor]:
        (folder / "config.json").write_text(json.dumps(self.config()))
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in self.shapes()
        }
        names = list(tensors)
        for number in range(self.num_files):
            own = {name: tensors[name] for name in names[number :: self.num_files]}
            content = save(own)
            if self.odd_header:
                length = int.from_bytes(content[:8], "little")
                header = content[8 : 8 + length] + b" " * (1 - length % 2)
                content = len(header).to_bytes(8, "little") + header + content[8 + length :]
                assert len(header) % 2 == 1
            (folder / f"model-{number}.safetensors").write_bytes(content)
        return tensors


def build_shard(
    folder: Path, plan: ShardPlan, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> DecoderForCausalLM:
    """Build the model of one rank, with NaN in every parameter."""
    config = read_checkpoint_config(str(folder))
    group = TPGroup(rank, plan.world_size)
    parts = ModelParts(config, plan.shards[rank], group, make_attention_backend("sdpa", 1.0), 64)
    model = build_model(parts, dtype, torch.device(device))
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    return model


def narrowed(layout: Layout, tensors: dict[str, Tensor], shard: RankShard) -> dict[str, Tensor]:
    """Return what each parameter of a rank must hold, cut out of whole tensors."""

    def rows(name: str, part: Range, scale: int = 1) -> Tensor:
        return tensors[name].narrow(0, part.start * scale, part.size * scale)

    expected = {name: tensors[name] for name in tensors if "norm" in name}
    for leaf in ("weight", "bias"):
        for layer in range(layout.num_layers):
            attention = f"model.layers.{layer}.self_attn."
            mlp = f"model.layers.{layer}.mlp."
            if f"{attention}q_proj.{leaf}" in tensors:
                heads = [
                    rows(f"{attention}{name}_proj.{leaf}", part, layout.head_dim)
                    for name, part in (("q", shard.q_heads), ("k", shard.kv_heads), ("v", shard.kv_heads))
                ]
                expected[f"{attention}qkv_proj.{leaf}"] = torch.cat(heads)
            if f"{mlp}gate_proj.{leaf}" in tensors:
                channels = [rows(f"{mlp}{name}_proj.{leaf}", shard.mlp_channels) for name in ("gate", "up")]
                expected[f"{mlp}gate_up_proj.{leaf}"] = torch.cat(channels)
            columns = Range(shard.q_heads.start * layout.head_dim, shard.q_heads.stop * layout.head_dim)
            for name, part in (
                (f"{attention}o_proj.{leaf}", columns),
                (f"{mlp}down_proj.{leaf}", shard.mlp_channels),
            ):
                if name in tensors:
                    whole = tensors[name]
                    expected[name] = whole if leaf == "bias" else whole.narrow(1, part.start, part.size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            expected[name] = rows(name, shard.vocab_rows)
    return expected


def evict(file: Path) -> None:
    """Take a file out of the page cache, as far as the system does that."""
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
