"""Convert a GGUF file of a llama model with a byte-level BPE tokenizer to a Hugging Face folder.

Knows nothing of where the file comes from. The weights are dequantised and written as bfloat16.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tprt.errors import CheckpointError, TprtError

WEIGHTS = "model.safetensors"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

# GGUF name -> Hugging Face name; `N` stands for the number of the layer.
TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.N.attn_norm.weight": "model.layers.N.input_layernorm.weight",
    "blk.N.attn_q.weight": "model.layers.N.self_attn.q_proj.weight",
    "blk.N.attn_k.weight": "model.layers.N.self_attn.k_proj.weight",
    "blk.N.attn_v.weight": "model.layers.N.self_attn.v_proj.weight",
    "blk.N.attn_output.weight": "model.layers.N.self_attn.o_proj.weight",
    "blk.N.ffn_norm.weight": "model.layers.N.post_attention_layernorm.weight",
    "blk.N.ffn_gate.weight": "model.layers.N.mlp.gate_proj.weight",
    "blk.N.ffn_up.weight": "model.layers.N.mlp.up_proj.weight",
    "blk.N.ffn_down.weight": "model.layers.N.mlp.down_proj.weight",
}

Metadata = dict[str, Any]


def convert(gguf_file: Path, folder: Path) -> None:
    """Make the Hugging Face folder `folder`, which must not exist, of the model in `gguf_file`.

    Raises:
        TprtError: the package gguf is not installed.
        CheckpointError: the file lacks a field, or holds a tensor or a tokenizer that this cannot convert.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise TprtError("the package gguf is missing; install it with 'pip install gguf'") from error
    reader = GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()
    try:
        names = write_weights(reader.tensors, metadata, folder / WEIGHTS)
        write_json(folder / "config.json", model_config(metadata, tied="lm_head.weight" not in names))
        write_json(folder / "generation_config.json", generation_config(metadata))
        write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
        write_tokenizer(metadata, folder / "tokenizer.json")
    except KeyError as error:
        raise CheckpointError(f"{gguf_file}: the metadata lacks {error}; expected a llama model") from error


def write_weights(tensors: list[Any], metadata: Metadata, path: Path) -> set[str]:
    """Write the dequantised tensors as bfloat16 and return their Hugging Face names."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    num_heads = {
        "q_proj": metadata["llama.attention.head_count"],
        "k_proj": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tensors:
        name = hugging_face_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in num_heads:
            weight = unpermute(weight, num_heads[projection])
        # A copy: torch warns about memory that it may not write, as that of the mapped file.
        weights[name] = torch.tensor(weight).to(torch.bfloat16)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod((path.parent.stat().st_mode & 0o666) | 0o200)  # safetensors makes it private to its owner
    return set(weights)


def hugging_face_name(gguf_name: str) -> str:
    """Translate the name of a tensor: `blk.7.attn_q.weight` is `model.layers.7.self_attn.q_proj.weight`."""
    layer = re.search(r"(?<=^blk\.)\d+", gguf_name)
    pattern = re.sub(r"^blk\.\d+", "blk.N", gguf_name)
    if pattern not in TENSOR_NAMES:
        raise CheckpointError(
            f"the GGUF file holds a tensor {gguf_name!r}; expected those of a llama model alone"
        )
    name = TENSOR_NAMES[pattern]
    return name.replace(".N.", f".{layer[0]}.") if layer else name


def unpermute(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Put the rows of a q or k projection [num_heads * D, H] back in Hugging Face order.

    GGUF keeps the two rows that a rotary embedding turns together next to each other: 0, D/2, 1, D/2 + 1, ...
    in each head of D rows. Hugging Face keeps the halves of a head apart: 0, 1, ..., D/2, D/2 + 1, ...
    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py, of which this is the inverse.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def model_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """Build config.json. transformers 4 and 5 both read `rope_theta` and `torch_dtype` at the top level."""
    eps = np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        # The shortest decimal of the float32: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(eps)),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **{f"{name}_token_id": token_id(metadata, name) for name in ("bos", "eos", "pad")},
    }


def token_id(metadata: Metadata, name: str) -> int:
    """The id of a special token under its Hugging Face name: `bos`, `eos`, `pad` or `unk`."""
    gguf_name = {"pad": "padding", "unk": "unknown"}.get(name, name)
    return int(metadata[f"tokenizer.ggml.{gguf_name}_token_id"])


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """Build generation_config.json: a chat ends at the eos token, a plain completion at `<|endoftext|>`."""
    ids = {f"{name}_token_id": token_id(metadata, name) for name in ("bos", "eos", "pad")}
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ends = [ids["eos_token_id"]]
    if "<|endoftext|>" in tokens:
        ends.append(tokens.index("<|endoftext|>"))
    return {**ids, "eos_token_id": list(dict.fromkeys(ends))}


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Build tokenizer_config.json, with the chat template.

    The class reads tokenizer.json as it is, in transformers 4 and 5; `GPT2Tokenizer` of 5 builds a tokenizer
    anew and loses the splitting of digits. The inputs are named because 4 adds `token_type_ids` otherwise.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {f"{name}_token": tokens[token_id(metadata, name)] for name in ("bos", "eos", "pad", "unk")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_tokenizer(metadata: Metadata, path: Path) -> None:
    """Write tokenizer.json: byte-level BPE in which each digit stands alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise CheckpointError(
            f"the GGUF file names the pre-tokenizer {metadata['tokenizer.ggml.pre']!r}; "
            "expected 'smollm', the only one that this script can write"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges: list[tuple[str, str]] = [
        (left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
    ]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(path))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` for programs and for people."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
