"""A GGUF file becomes a folder with the weights, names and tokens that the model had before."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

from scripts.llama_gguf import FILES, TENSOR_NAMES, convert, hugging_face_name, unpermute
from tprt.errors import CheckpointError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *BYTES, "he", "11"]
SHAPES = {
    "token_embd": (len(TOKENS), HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
}


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The order of GGUF, row by row: a head's rows i and i + D/2 become neighbours."""
    head_dim = len(weight) // num_heads
    half = head_dim // 2
    order = [h * head_dim + i + j * half for h in range(num_heads) for i in range(half) for j in (0, 1)]
    return weight[order]


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def write_gguf(path: Path, tensors: dict[str, np.ndarray], pre_tokenizer: str = "smollm") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(128)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    add_tokenizer(writer, pre_tokenizer)
    for name, data in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["h e", "1 1"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert(write_gguf(tmp_path / "m.gguf", random_weights()), tmp_path / "model")
    return tmp_path / "model"


def read(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


@given(num_heads=st.integers(1, 9), half=st.integers(1, 8), num_columns=st.integers(1, 5))
def test_unpermute_is_the_inverse_of_the_order_of_gguf(num_heads: int, half: int, num_columns: int) -> None:
    shape = (num_heads * half * 2, num_columns)
    weight = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    assert np.array_equal(unpermute(permute(weight, num_heads), num_heads), weight)


def test_unpermute_moves_rows_within_a_head_only() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("layer", [0, 7, 29])
def test_a_layer_keeps_its_number(layer: int) -> None:
    name = hugging_face_name(f"blk.{layer}.attn_q.weight")
    assert name == f"model.layers.{layer}.self_attn.q_proj.weight"


def test_no_two_tensors_get_the_same_name() -> None:
    assert len(set(TENSOR_NAMES.values())) == len(TENSOR_NAMES)


def test_weights_come_back_dequantised_and_in_hugging_face_order(tmp_path: Path) -> None:
    original = random_weights()
    stored = dict(original)
    stored["blk.0.attn_q"] = permute(original["blk.0.attn_q"], HEADS)
    stored["blk.0.attn_k"] = permute(original["blk.0.attn_k"], KV_HEADS)
    convert(write_gguf(tmp_path / "m.gguf", stored), tmp_path / "model")
    loaded = load_file(tmp_path / "model" / "model.safetensors")
    assert set(loaded) == {hugging_face_name(f"{name}.weight") for name in original}
    for name, expected in original.items():
        found = loaded[hugging_face_name(f"{name}.weight")]
        assert found.dtype == torch.bfloat16
        # Q8_0 errs by half a step of max/127 at most, bfloat16 by 2**-9 of the value.
        torch.testing.assert_close(found.float(), torch.from_numpy(expected), atol=0.03, rtol=0.004)


def test_the_configuration_says_what_the_gguf_says(folder: Path) -> None:
    config = read(folder / "config.json")
    assert config["num_attention_heads"] == HEADS
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["head_dim"] == HEAD_DIM
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert read(folder / "generation_config.json")["eos_token_id"] == [2, 0]


def test_a_model_with_an_output_matrix_is_not_tied(tmp_path: Path) -> None:
    tensors = random_weights() | {"output": np.ones(SHAPES["token_embd"], np.float32)}
    convert(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "model")
    assert read(tmp_path / "model" / "config.json")["tie_word_embeddings"] is False


def test_every_file_is_readable_by_whoever_can_read_the_folder(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@given(text=st.text())
def test_any_text_survives_the_tokenizer(folder_of_session: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder_of_session / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def folder_of_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("gguf")
    convert(write_gguf(work / "m.gguf", random_weights()), work / "model")
    return work / "model"


def test_digits_stand_alone_and_special_tokens_are_one_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("he11<|im_end|>").tokens == ["he", "1", "1", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("he<|im_end|>").ids) == "he"


def test_the_tokenizer_configuration_names_tokens_and_the_chat_template(folder: Path) -> None:
    config = read(folder / "tokenizer_config.json")
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == config["pad_token"] == "<|im_end|>"
    assert config["unk_token"] == "<|endoftext|>"
    assert config["chat_template"] == "{{ messages }}"


def test_a_tensor_that_no_llama_has_is_named(tmp_path: Path) -> None:
    tensors = random_weights() | {"blk.0.ssm_a": np.ones(HIDDEN, np.float32)}
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ssm_a\.weight'"):
        convert(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "model")


def test_another_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_weights(), pre_tokenizer="qwen2")
    with pytest.raises(CheckpointError, match="'qwen2'; expected 'smollm'"):
        convert(path, tmp_path / "model")


def test_a_file_of_another_family_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="expected a llama model"):
        convert(tmp_path / "m.gguf", tmp_path / "model")
