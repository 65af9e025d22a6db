"""A shape is what the checkpoint says, and counts the weights that a layer would hold."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.sharding.shapes import QWEN3_8B, SMOLLM2_135M
from tprt.checkpoint_config import read_checkpoint_config
from tprt.sharding import Range, RankShard, shape_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def test_the_shape_of_a_checkpoint_is_that_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert shape_of(read_checkpoint_config(str(tmp_path))) == SMOLLM2_135M


def test_a_range_is_half_open() -> None:
    assert Range(3, 7).size == 4
    assert Range(3, 3).size == 0


def test_a_rank_of_smollm2_that_holds_everything_has_134_million_split_weights() -> None:
    everything = RankShard(0, Range(0, 9), Range(0, 3), Range(0, 1536), Range(0, 49152))
    norms = (2 * 30 + 1) * 576
    assert everything.weight_elements(SMOLLM2_135M) == 134_515_008 - norms


def test_an_lm_head_of_its_own_doubles_the_weights_of_a_token() -> None:
    assert QWEN3_8B.vocab_row_elements == 2 * QWEN3_8B.hidden_size
    assert SMOLLM2_135M.vocab_row_elements == SMOLLM2_135M.hidden_size
