"""The sizes that decide how a model can be split, and the parts that come out. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass

from tprt.checkpoint_config import CheckpointConfig


@dataclass(frozen=True, slots=True)
class Range:
    """The half-open range from `start` to `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many items it holds."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a plan needs to know of a model, under the names of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def q_head_elements(self) -> int:
        """Weights of one query head: its rows of q_proj and its columns of o_proj, over all layers."""
        return 2 * self.head_dim * self.hidden_size * self.num_hidden_layers

    @property
    def kv_head_elements(self) -> int:
        """Weights of one key/value head: its rows of k_proj and v_proj, over all layers."""
        return 2 * self.head_dim * self.hidden_size * self.num_hidden_layers

    @property
    def mlp_channel_elements(self) -> int:
        """Weights of one MLP channel: rows of gate_proj and up_proj, a column of down_proj, over all layers."""
        return 3 * self.hidden_size * self.num_hidden_layers

    @property
    def vocab_row_elements(self) -> int:
        """Weights of one token: its row of the embedding and, unless tied, of the LM head."""
        return self.hidden_size * (1 if self.tie_word_embeddings else 2)


@dataclass(frozen=True, slots=True)
class RankShard:
    """The part of the model that rank `rank` holds."""

    rank: int
    q_heads: Range
    kv_heads: Range
    mlp_channels: Range
    vocab_rows: Range

    def weight_elements(self, shape: ModelShape) -> int:
        """Return how many weights of split matrices this rank holds; norms and biases are left out."""
        return (
            self.q_heads.size * shape.q_head_elements
            + self.kv_heads.size * shape.kv_head_elements
            + self.mlp_channels.size * shape.mlp_channel_elements
            + self.vocab_rows.size * shape.vocab_row_elements
        )


def shape_of(config: CheckpointConfig) -> ModelShape:
    """Return the shape of a checkpoint's model."""
    return ModelShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
    )
