"""A made checkpoint has the shape, the files and the size asked for, and others can open it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from scripts import make_checkpoint as script
from scripts.checkpoint_shapes import SHAPES, ModelShape, num_elements, tensor_shapes
from scripts.make_checkpoint import make_checkpoint, with_size
from scripts.random_safetensors import INDEX, DType
from tprt.checkpoint_config import read_checkpoint_config
from tprt.errors import ConfigError
from tprt.sharding import make_shard_plan, shape_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 11, "vocab_size": 101}
QWEN3 = replace(SHAPES["qwen3-8b"], **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
LLAMA = replace(SHAPES["llama-3.1-8b"], **SMALL, num_attention_heads=8, num_key_value_heads=4, head_dim=8)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
    return found


@pytest.mark.parametrize(
    "shape",
    [
        QWEN3,
        LLAMA,
        replace(QWEN3, tie_word_embeddings=True, bias=True),
        replace(LLAMA, tie_word_embeddings=True, bias=True),
    ],
)
@pytest.mark.parametrize("num_files", [1, 3])
def test_transformers_finds_every_tensor_of_its_model_and_no_other(
    tmp_path: Path, shape: ModelShape, num_files: int
) -> None:
    make_checkpoint(tmp_path / "made", shape, "float32", num_files, seed=0)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert type(model).__name__ == shape.architecture
    assert not any(loading.values())
    with torch.no_grad():
        logits = model(torch.arange(24)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 1e-4


@pytest.mark.parametrize(("dtype", "item_bytes"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_tensors_have_the_type_and_shape_asked_for_and_small_values(
    tmp_path: Path, dtype: DType, item_bytes: int
) -> None:
    make_checkpoint(tmp_path / "made", QWEN3, dtype, 1, seed=0)
    found = tensors_of(tmp_path / "made")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == tensor_shapes(QWEN3)
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
    assert {tensor.element_size() for tensor in found.values()} == {item_bytes}
    for name, tensor in found.items():
        if name.endswith("norm.weight"):
            assert 0.4 < tensor.min() < tensor.max() < 1.6
        else:
            assert 0.01 < tensor.float().std() < 0.04
            assert tensor.float().abs().max() < 0.2


def test_no_two_tensors_are_equal_and_no_row_is_repeated(tmp_path: Path) -> None:
    # two tensors of several blocks of random numbers
    shape = replace(QWEN3, vocab_size=80_000, num_hidden_layers=2)
    make_checkpoint(tmp_path / "made", shape, "bfloat16", 1, seed=0)
    found = tensors_of(tmp_path / "made")
    flat = [tensor.flatten()[:16].tolist() for tensor in found.values()]
    assert len({tuple(values) for values in flat}) == len(found)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(found[name].unique(dim=0)) == 80_000


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(tmp_path / name, QWEN3, "bfloat16", 1, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("num_files", [2, 3, 7])
def test_the_index_names_the_file_of_every_tensor_and_files_are_about_equal(
    tmp_path: Path, num_files: int
) -> None:
    make_checkpoint(tmp_path / "made", QWEN3, "bfloat16", num_files, seed=0)
    index = json.loads((tmp_path / "made" / INDEX).read_text())
    files = sorted((tmp_path / "made").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{file:05d}-of-{num_files:05d}.safetensors" for file in range(1, num_files + 1)
    ]
    weight_map: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
    assert index["weight_map"] == weight_map
    found = tensors_of(tmp_path / "made")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    largest = max(t.numel() * t.element_size() for t in found.values())
    sizes = sorted(file.stat().st_size for file in files)
    assert all(abs(b - a) < 2 * largest for a, b in pairwise(sizes))


def test_as_many_files_as_tensors_leave_none_empty_and_more_are_refused(tmp_path: Path) -> None:
    shape = replace(QWEN3, num_hidden_layers=1, vocab_size=5000)
    count = len(tensor_shapes(shape))
    make_checkpoint(tmp_path / "made", shape, "bfloat16", count, seed=0)
    for file in (tmp_path / "made").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert len(tensors.keys()) == 1
    with pytest.raises(ConfigError, match=f"expected 1 to {count} files"):
        make_checkpoint(tmp_path / "more", shape, "bfloat16", count + 1, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_model_can_be_made_small_and_is_read_by_tprt(tmp_path: Path, name: str) -> None:
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 2, "vocab_size": 64}
    shape = replace(SHAPES[name], **small)
    make_checkpoint(tmp_path / "made", shape, "bfloat16", 1, seed=0)
    config = read_checkpoint_config(str(tmp_path / "made"))
    assert config.architecture == shape.architecture
    assert config.dtype == "bfloat16"
    assert config.rope_theta == shape.rope_theta
    assert (config.rope_scaling is not None) == (shape.rope_factor is not None)
    assert len(make_shard_plan(shape_of(config), 2).shards) == 2


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-8b", 8.19), ("llama-3.1-8b", 8.03), ("qwen3-0.6b", 0.596)]
)
def test_named_models_have_as_many_parameters_as_their_makers_say(name: str, billions: float) -> None:
    counts = [torch.Size(shape).numel() for shape in tensor_shapes(SHAPES[name]).values()]
    assert sum(counts) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_size_is_met_within_half_a_layer(tmp_path: Path) -> None:
    shape = with_size(QWEN3, 1 / 1024, "bfloat16")
    make_checkpoint(tmp_path / "made", shape, "bfloat16", 2, seed=0)
    size = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "made").values())
    layer, _ = num_elements(shape)
    assert abs(size - (1 << 20)) <= 2 * layer / 2
    assert shape.num_hidden_layers != QWEN3.num_hidden_layers
    with pytest.raises(ConfigError, match="give more, or a smaller --vocab-size"):
        with_size(SHAPES["qwen3-8b"], 1.0, "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "cannot share 2 key/value heads evenly"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected 1 or more"),
        ({"head_dim": 3}, "head_dim is 3; the rotary embedding needs an even number"),
    ],
)
def test_a_shape_that_no_model_has_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(QWEN3, **change)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script.__file__, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_makes_what_its_options_say_and_overwrites_nothing(tmp_path: Path) -> None:
    output = str(tmp_path / "new" / "made")
    options = ["--like", "llama-3.2-1b", "--hidden-size", "16", "--intermediate-size", "24", "--no-tie"]
    options += ["--num-hidden-layers", "2", "--num-attention-heads", "4", "--num-key-value-heads", "2"]
    options += ["--head-dim", "4", "--vocab-size", "50", "--dtype", "float16", "--num-files", "2", "--bias"]
    ran = run_script(output, *options, "--architecture", "LlamaForCausalLM")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "2 layers" in ran.stdout
    config = read_checkpoint_config(output)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (16, 24, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    assert (config.vocab_size, config.dtype, config.tie_word_embeddings) == (50, "float16", False)
    assert config.attention_bias
    assert config.mlp_bias
    assert len(list(Path(output).glob("*.safetensors"))) == 2
    again = run_script(output, *options)
    assert again.returncode == 1
    assert "is there already; remove it or name another folder" in again.stderr


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    ran = run_script(str(tmp_path / "made"), "--like", "gpt-2")
    assert ran.returncode == 1
    assert ran.stderr.startswith("make_checkpoint: --like gpt-2: expected one of qwen3-0.6b")
    assert list(tmp_path.iterdir()) == []
