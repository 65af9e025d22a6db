"""A packed weight multiplies like any other, and asks oneDNN for few numbers of rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tprt.layers import packed_weight
from tprt.layers.packed_weight import PackedWeight

torch_has_onednn = packed_weight.can_pack(torch.ones(1, 1))
pytestmark = pytest.mark.skipif(not torch_has_onednn, reason="this build of torch has no oneDNN")


def packable(dtype: torch.dtype) -> object:
    """Return `dtype` as a parameter of a test that needs a CPU where it can be packed."""
    there = packed_weight.can_pack(torch.ones(1, 1, dtype=dtype))
    return pytest.param(dtype, marks=pytest.mark.skipif(not there, reason=f"this CPU does not pack {dtype}"))


@pytest.mark.parametrize("dtype", [packable(torch.float32), packable(torch.bfloat16)])
@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, 31, 33, 100, 129])
def test_a_row_does_not_depend_on_how_many_there_are(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 40, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    x = torch.randn(144, 40, generator=generator).to(dtype)
    packed = PackedWeight(weight)
    found = packed.multiply(x[:num_rows], bias)
    assert found.shape == (num_rows, 24)
    assert torch.equal(found, packed.multiply(x, bias)[:num_rows])
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, functional.linear(x[:num_rows], weight, bias), atol=tolerance, rtol=0.02)


def test_few_numbers_of_rows_stand_for_all_and_none_is_much_larger() -> None:
    counts = range(1, 8193)
    rounded = [packed_weight._rounded_up(count) for count in counts]
    assert len(set(rounded)) < 100
    assert all(count <= found <= 1.125 * count for count, found in zip(counts, rounded, strict=True))
    assert rounded[:16] == list(range(1, 17))
