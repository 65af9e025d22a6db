"""The decoder-only transformer that the dense models share: pre-norm, rotary, grouped queries, gated MLP.

A model file says by class attributes how it differs. Knows nothing of files, processes and scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tprt import kernels
from tprt.attention import AttentionBackend
from tprt.checkpoint_config import CheckpointConfig
from tprt.context import get_context
from tprt.distributed import TPGroup
from tprt.kernels.preparation import HeadNorms, Preparation
from tprt.layers.activation import SiluAndMul
from tprt.layers.attention import Attention
from tprt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from tprt.layers.norm import RMSNorm
from tprt.layers.parameter import ShardId
from tprt.layers.rotary import RotaryEmbedding, Rotation
from tprt.sharding import Range, RankShard


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What every module of a model is built from."""

    config: CheckpointConfig
    shard: RankShard
    group: TPGroup
    backend: AttentionBackend
    max_model_len: int


class DecoderAttention(nn.Module):
    """Self-attention of one layer over this rank's heads, summed over ranks by the output projection."""

    def __init__(self, parts: ModelParts, qk_norm: bool) -> None:
        super().__init__()
        config, shard = parts.config, parts.shard
        size = config.head_dim
        heads = (config.num_attention_heads, shard.q_heads)
        kv_heads = (config.num_key_value_heads, shard.kv_heads)
        kv_is_replicated = parts.group.world_size > config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, size, heads, kv_heads, config.attention_bias, kv_is_replicated
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * size,
            config.hidden_size,
            Range(shard.q_heads.start * size, shard.q_heads.stop * size),
            parts.group,
            config.attention_bias,
        )
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if qk_norm else None
        self.attn = Attention(shard.kv_heads.size, size, parts.backend)
        self._head_dim = size
        self._num_heads = (shard.q_heads.size, shard.kv_heads.size)

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """`hidden` `[T, H]` to `[T, H]`."""
        heads = self.qkv_proj(hidden).view(len(hidden), -1, self._head_dim)
        if not kernels.can_use(heads):
            attended = self.attn(*self._prepare(heads, rotation))
        elif self.attn.prepares(len(heads)):
            attended = self.attn.prepare_and_decode(heads, self._preparation(rotation))
        else:
            attended = self.attn.attend(*self._prepare_in_one(heads, rotation))
        result: Tensor = self.o_proj(attended.flatten(1))
        return result

    def _prepare(self, heads: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Turn `[T, h + 2 kv, D]` into queries `[T, h, D]`, keys and values `[T, kv, D]`, ready to attend."""
        num_q, num_kv = self._num_heads
        rotated, value = torch.split(heads, [num_q + num_kv, num_kv], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = torch.split(rotated, [num_q, num_kv], dim=1)
            rotated = torch.cat([self.q_norm(query), self.k_norm(key)], dim=1)
        query, key = torch.split(rotation.apply(rotated), [num_q, num_kv], dim=1)
        return query, key, value

    def _prepare_in_one(self, heads: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same and store keys and values, in one kernel; the keys count only where they are read."""
        from tprt.kernels.qk_rotary import prepare_attention

        context = get_context()
        slots = context.slot_mapping
        return prepare_attention(
            heads,
            self._num_heads,
            self._preparation(rotation),
            cache=None if slots is None else (self.attn.kv_cache, slots),
            keep_keys=context.is_prefill and context.block_tables is None,
        )

    def _preparation(self, rotation: Rotation) -> Preparation:
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        return Preparation(rotation.cos, rotation.signed_sin, rotation.positions, norms)


class DecoderMLP(nn.Module):
    """The gated MLP of one layer over this rank's channels, summed over ranks by the down projection."""

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        config, channels = parts.config, parts.shard.mlp_channels
        whole = (config.intermediate_size, channels)
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, {0: whole, 1: whole}, config.mlp_bias
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, channels, parts.group, config.mlp_bias
        )
        self.act_fn = SiluAndMul()

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` `[T, H]` to `[T, H]`."""
        result: Tensor = self.down_proj(self._gated(hidden))
        return result

    def _gated(self, hidden: Tensor) -> Tensor:
        """Project and activate: `[T, H]` to `[T, i]`."""
        weight = self.gate_up_proj.weight
        if weight is not None and self.gate_up_proj.bias is None and kernels.can_use(hidden):
            from tprt.kernels.gated_gemv import can_multiply_gated, multiply_gated

            if can_multiply_gated(hidden, weight):
                return multiply_gated(hidden, weight)
        activated: Tensor = self.act_fn(self.gate_up_proj(hidden))
        return activated


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, parts: ModelParts, qk_norm: bool) -> None:
        super().__init__()
        config = parts.config
        self.self_attn = DecoderAttention(parts, qk_norm)
        self.mlp = DecoderMLP(parts)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor | None, residual: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Take and return (`hidden`, `residual`), both `[T, H]`, not yet added; the first gets no `hidden`."""
        normed, residual = self.input_layernorm.add_forward(hidden, residual)
        attended = self.self_attn(normed, rotation)
        normed, residual = self.post_attention_layernorm.add_forward(attended, residual)
        return self.mlp(normed), residual


class DecoderModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, parts: ModelParts, qk_norm: bool) -> None:
        super().__init__()
        config = parts.config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, parts.shard.vocab_rows, parts.group
        )
        self.layers = nn.ModuleList(DecoderLayer(parts, qk_norm) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._group = parts.group
        self.rotary_emb = RotaryEmbedding(
            config.head_dim, parts.max_model_len, config.rope_theta, config.rope_scaling
        )

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """`token_ids` and `positions` `[T]` int64, to hidden states `[T, H]`."""
        residual: Tensor = self.embed_tokens(token_ids)
        rotation = self.rotary_emb(positions)
        hidden: Tensor | None = None
        observer = self._group.observer
        for number, layer in enumerate(self.layers):
            observer.enter_layer(number)
            hidden, residual = layer(hidden, residual, rotation)
        observer.leave_layers()
        normed: Tensor = self.norm.add_forward(hidden, residual)[0]
        return normed

    @contextmanager
    def only_first_layer(self) -> Iterator[None]:
        """Leave out the other layers, which launch no kernel that the first one does not."""
        layers, self.layers = self.layers, self.layers[:1]
        try:
            yield
        finally:
            self.layers = layers


class DecoderForCausalLM(nn.Module):
    """A decoder with its LM head. Subclasses set the class attributes."""

    packed_modules_mapping: ClassVar[Mapping[str, tuple[str, ShardId]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
    """Module name in the checkpoint, to the module here that holds it and its shard id there."""

    qk_norm: ClassVar[bool] = False
    """Whether queries and keys are normalised per head before the rotary embedding."""

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        config = parts.config
        self.model = DecoderModel(parts, self.qk_norm)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            parts.shard.vocab_rows,
            self.model.embed_tokens if config.tie_word_embeddings else None,
        )

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """`token_ids` and `positions` `[T]` int64, to hidden states `[T, H]`; needs a `Context`."""
        hidden: Tensor = self.model(token_ids, positions)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits `[S, v]` for the sequences that are to be sampled."""
        logits: Tensor = self.lm_head(hidden)
        return logits
