"""An output ends at the tokens that the configs name, and at the one that the tokenizer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tprt.checkpoint_config import end_token_ids, read_checkpoint_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
}
END = {"content": "<|end|>", "special": False}


def ends(folder: Path, **files: dict[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an output of the checkpoint with these files."""
    files = {"config": CONFIG, "generation_config": {"eos_token_id": [0]}, **files}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return end_token_ids(str(folder), read_checkpoint_config(str(folder)))


@pytest.mark.parametrize("eos_token", ["<|end|>", END])
def test_the_tokenizers_own_token_ends_an_output_too(tmp_path: Path, eos_token: object) -> None:
    settings = {"eos_token": eos_token, "added_tokens_decoder": {"0": {"content": "</s>"}, "7": END}}
    assert ends(tmp_path, tokenizer_config=settings) == (0, 7)


def test_it_is_looked_up_in_tokenizer_json_where_the_settings_do_not_list_it(tmp_path: Path) -> None:
    added = [{"content": "</s>", "id": 0}, {**END, "id": 7}]
    settings = {"eos_token": "<|end|>"}
    assert ends(tmp_path, tokenizer_config=settings, tokenizer={"added_tokens": added}) == (0, 7)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token": None},
        {"eos_token": "<|nowhere|>"},
        {"eos_token": "</s>", "added_tokens_decoder": {"0": {"content": "</s>"}}},
        {"eos_token": "<|end|>", "added_tokens_decoder": {"99999999": END}},
    ],
)
def test_otherwise_those_of_the_configs_are_all(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert ends(tmp_path) == (0,)
    assert ends(tmp_path, tokenizer_config=settings) == (0,)
