"""Peers fill the parameters as they should, so that what they are compared in is the same work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.bench.load_peers import Peer, installed_peers, load_slices, load_whole_tensors
from tests.support.checkpoints import TinyModel, save_tiny
from tprt.attention import make_attention_backend
from tprt.checkpoint_config import read_checkpoint_config
from tprt.distributed import TPGroup
from tprt.models import ModelParts, build_model
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights import open_checkpoint

WORLD_SIZE = 3


@pytest.fixture(scope="module", params=[TinyModel("qwen3", tied=True), TinyModel("llama", bias=True)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, request.param, shard_size="100KB")
    return str(folder)


def empty_model(folder: str, rank: int) -> nn.Module:
    checkpoint = read_checkpoint_config(folder)
    shard = make_shard_plan(shape_of(checkpoint), WORLD_SIZE).shards[rank]
    backend = make_attention_backend("auto", 1.0)
    parts = ModelParts(checkpoint, shard, TPGroup(rank, WORLD_SIZE), backend, max_model_len=1)
    model = build_model(parts, torch.float32, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


def test_the_two_that_are_always_there_are_known_by_name() -> None:
    assert list(installed_peers().items())[:2] == [
        ("get_tensor", load_whole_tensors),
        ("get_slice", load_slices),
    ]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_slices_and_whole_tensors_leave_the_same_in_every_parameter(folder: str, rank: int) -> None:
    filled = []
    for peer in (load_whole_tensors, load_slices):
        model = empty_model(folder, rank)
        peer(model, folder)
        filled.append(dict(model.named_parameters()))
    whole, slices = filled
    assert whole.keys() == slices.keys()
    for name, parameter in whole.items():
        assert not parameter.isnan().any(), name
        assert torch.equal(parameter, slices[name]), name


@pytest.mark.parametrize(("peer", "times"), [(load_whole_tensors, 1.0), (load_slices, None)])
def test_a_peer_tells_what_it_asked_for(folder: str, peer: Peer, times: float | None) -> None:
    model = empty_model(folder, 1)
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    expected = open_checkpoint(folder).num_bytes if times else parameter_bytes
    assert peer(model, folder) == expected
