"""What the layers that have kernels do where there are none, and how work for kernels is cut."""

from __future__ import annotations

import pytest
import torch

from tprt import kernels
from tprt.kernels.gemv_tiles import DotTile, VectorTile, tile_for
from tprt.layers.norm import RMSNorm
from tprt.layers.packed_weight import multiply_plain
from tprt.layers.rotary import RotaryEmbedding, apply_rotary


def test_no_kernel_is_for_tensors_on_a_cpu() -> None:
    assert not kernels.can_use(torch.zeros(2, dtype=torch.bfloat16))


def test_a_power_of_two_holds_a_size_and_is_less_than_twice_as_much() -> None:
    for size in range(1, 300):
        power = kernels.power_of_two(size)
        assert power & (power - 1) == 0
        assert size <= power < 2 * size or size == power == 1


def test_the_first_norm_has_nothing_to_add() -> None:
    norm = RMSNorm(6, 1e-6)
    norm.weight.data = torch.rand(6)
    residual = torch.randn(3, 6)
    before = residual.clone()
    normed, same = norm.add_forward(None, residual)
    assert normed.equal(norm(before))
    assert same is residual
    assert residual.equal(before)


def test_a_norm_adds_to_the_residual_in_place() -> None:
    norm = RMSNorm(6, 1e-6)
    norm.weight.data = torch.rand(6)
    x, residual = torch.randn(3, 6), torch.randn(3, 6)
    expected = x + residual
    normed, same = norm.add_forward(x, residual)
    assert same is residual
    assert residual.equal(expected)
    assert normed.equal(norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_is_by_the_tables_at_the_positions(dtype: torch.dtype) -> None:
    rotation = RotaryEmbedding(8, 50, 10000.0)(torch.tensor([3, 0, 49]))
    x = torch.randn(3, 2, 8).to(dtype)
    cos, sin = (table[[3, 0, 49]].unsqueeze(1).to(dtype) for table in (rotation.cos, rotation.signed_sin))
    for _ in range(2):
        assert rotation.apply(x).equal(apply_rotary(x, cos, sin))
    assert rotation.apply(x)[1].equal(x[1])


def test_a_weight_that_was_not_packed_is_multiplied_all_the_same() -> None:
    x, weight, bias = torch.randn(2, 5), torch.randn(3, 5), torch.randn(3)
    torch.testing.assert_close(multiply_plain(x, weight, bias), x @ weight.T + bias)


def test_tiles_cover_a_few_rows_and_leave_the_rest_to_cublas() -> None:
    assert isinstance(tile_for(1, 4096, 1024), VectorTile)
    dot = tile_for(8, 1024, 3072)
    assert isinstance(dot, DotTile)
    assert dot.splits > 1
    assert 1024 / dot.columns * dot.splits >= 132
    many = tile_for(64, 1024, 3072)
    assert isinstance(many, DotTile)
    assert (many.columns, many.splits) == (16, 2)
    for shape in (
        (0, 8, 8),
        (65, 4096, 1024),
        (17, 6144, 4096),
        (8, 4096, 1020),
        (8, 151936, 4096),
        (1, 0, 8),
        (1, 8, 0),
    ):
        assert tile_for(*shape) is None, shape
