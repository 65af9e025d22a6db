"""A checkpoint fills a model exactly, or says all that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.checkpoints import TinyModel, save_tiny
from tprt.attention import make_attention_backend
from tprt.checkpoint_config import read_checkpoint_config
from tprt.distributed import TPGroup
from tprt.errors import CheckpointError, UnsupportedModelError
from tprt.models import DecoderForCausalLM, ModelParts, build_model
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights import load_dummy_weights, load_model, open_checkpoint

TINY = TinyModel(heads=9, kv_heads=3, bias=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path, TINY)
    return tmp_path


def build(
    folder: Path, rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float32
) -> DecoderForCausalLM:
    config = read_checkpoint_config(str(folder))
    plan = make_shard_plan(shape_of(config), world_size)
    parts = ModelParts(
        config, plan.shards[rank], TPGroup(rank, world_size), make_attention_backend("sdpa", 1.0), 64
    )
    return build_model(parts, dtype, torch.device("cpu"))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of the checkpoint; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_parameter_is_the_narrowed_tensor(folder: Path, world_size: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    plan = make_shard_plan(shape_of(read_checkpoint_config(str(folder))), world_size)
    for shard in plan.shards:
        model = build(folder, shard.rank, world_size)
        load_model(model, str(folder))
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
        size = TINY.head_dim
        q, kv = (slice(r.start * size, r.stop * size) for r in (shard.q_heads, shard.kv_heads))
        channels = slice(shard.mlp_channels.start, shard.mlp_channels.stop)
        prefix = "model.layers.1."
        expected_qkv = torch.cat(
            [
                tensors[f"{prefix}self_attn.{n}_proj.weight"][part]
                for n, part in (("q", q), ("k", kv), ("v", kv))
            ]
        )
        assert torch.equal(attention.qkv_proj.weight, expected_qkv)
        assert torch.equal(attention.o_proj.weight, tensors[f"{prefix}self_attn.o_proj.weight"][:, q])
        assert torch.equal(attention.o_proj.bias, tensors[f"{prefix}self_attn.o_proj.bias"])
        gate_up = torch.cat([tensors[f"{prefix}mlp.{n}_proj.weight"][channels] for n in ("gate", "up")])
        assert torch.equal(mlp.gate_up_proj.weight, gate_up)
        assert torch.equal(mlp.down_proj.weight, tensors[f"{prefix}mlp.down_proj.weight"][:, channels])
        rows = slice(shard.vocab_rows.start, shard.vocab_rows.stop)
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"][rows])
        assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])


def test_a_checkpoint_in_several_files_loads_like_one_file(tmp_path: Path) -> None:
    save_tiny(tmp_path / "one", TINY)
    save_tiny(tmp_path / "many", TINY, shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    models = [build(tmp_path / name) for name in ("one", "many")]
    for model, name in zip(models, ("one", "many"), strict=True):
        load_model(model, str(tmp_path / name))
    for (name, one), (_, many) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, many), name


def test_weights_are_converted_to_the_type_of_the_model(folder: Path) -> None:
    model = build(folder, dtype=torch.bfloat16)
    load_model(model, str(folder))
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(model.model.embed_tokens.weight, expected)


@pytest.mark.parametrize("repeated", [False, True])
def test_tied_embeddings_share_one_parameter_whether_the_checkpoint_repeats_it_or_not(
    tmp_path: Path, repeated: bool
) -> None:
    save_tiny(tmp_path, TinyModel(tied=True))
    if repeated:
        rewrite(tmp_path, {"lm_head.weight": torch.zeros(199, 64)})
    model = build(tmp_path)
    load_model(model, str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.abs().sum() > 0


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_error(folder: Path) -> None:
    rewrite(
        folder,
        {
            "model.layers.0.self_attn.k_proj.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.zeros(5, 7),
            "model.layers.9.mlp.up_proj.weight": torch.zeros(3, 2),
        },
    )
    with pytest.raises(CheckpointError) as error:
        load_model(build(folder), str(folder))
    text = str(error.value)
    assert "model.layers.0.self_attn.k_proj.weight [48, 72]" in text
    assert "model.layers.9.mlp.up_proj.weight [3, 2]" in text
    assert "model.layers.1.mlp.up_proj.weight: checkpoint [5, 7], model [112, 72]" in text


def test_a_plain_parameter_is_filled_whole(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    model = nn.Linear(3, 2)
    load_model(model, str(tmp_path))
    assert model.weight.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_dummy_weights_are_finite_and_the_same_every_time(folder: Path) -> None:
    first, second = build(folder), build(folder)
    for model in (first, second):
        load_dummy_weights(model)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()


class TestRefused:
    def test_no_such_folder(self) -> None:
        with pytest.raises(CheckpointError, match=r"there is no folder '/nowhere/model'"):
            open_checkpoint("/nowhere/model")

    def test_a_folder_without_safetensors(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file"):
            open_checkpoint(str(tmp_path))

    def test_pickled_weights_with_the_advice_to_convert_them(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(
            CheckpointError, match=r"pytorch_model.bin can run code .* convert it to safetensors"
        ):
            open_checkpoint(str(tmp_path))

    def test_a_truncated_file(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes .* truncated or damaged"):
            open_checkpoint(str(folder))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"abc", "announces a header"),
            ((2**60).to_bytes(8, "little") + b"{}", "announces a header"),
            ((7).to_bytes(8, "little") + b"not json", "not JSON"),
            ((4).to_bytes(8, "little") + b"[12]", "expected a JSON object"),
        ],
    )
    def test_what_is_no_safetensors_file(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(tmp_path))

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
            {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1]},
            "nonsense",
        ],
    )
    def test_a_header_that_describes_a_tensor_wrongly(self, tmp_path: Path, entry: object) -> None:
        write_file(tmp_path / "model.safetensors", {"x": entry}, b"\0" * 4)
        with pytest.raises(CheckpointError, match="describes tensor 'x' wrongly"):
            open_checkpoint(str(tmp_path))

    def test_overlapping_tensors(self, tmp_path: Path) -> None:
        whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        part = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
        write_file(tmp_path / "model.safetensors", {"a": whole, "b": part}, b"\0" * 8)
        with pytest.raises(CheckpointError, match="tensor 'b' begins at byte 4 of the data; expected 8"):
            open_checkpoint(str(tmp_path))

    def test_a_type_that_is_not_loaded(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="tensor 'x' is I8; tprt loads F32, F16, BF16"):
            open_checkpoint(str(tmp_path))

    def test_an_index_that_names_a_missing_file(self, tmp_path: Path) -> None:
        index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="names files that are not there: model-00001-of-00002"):
            open_checkpoint(str(tmp_path))

    def test_an_index_that_leaves_the_folder(self, tmp_path: Path) -> None:
        index = {"weight_map": {"x": "../secret.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="must not leave the folder"):
            open_checkpoint(str(tmp_path))

    def test_a_tensor_in_two_files(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=r"tensor 'x' is in a\.safetensors too"):
            open_checkpoint(str(tmp_path))

    def test_an_architecture_that_is_not_known_with_those_that_are(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
        with pytest.raises(
            UnsupportedModelError, match="'MambaForCausalLM'; tprt runs LlamaForCausalLM, Qwen3"
        ):
            build(folder)


def write_file(file: Path, header: dict[str, object], data: bytes) -> None:
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
