"""Noise is Gumbel's, to the last bit the same wherever it is computed."""

from __future__ import annotations

import math

import numpy as np
import torch

from tprt.layers.noise import _log, gumbel_noise, noise_keys


def keys_of(count: int) -> torch.Tensor:
    return torch.from_numpy(noise_keys(np.arange(count, dtype=np.int64), np.full(count, 3, np.int32)))


def test_the_logarithm_is_one_near_zero_near_one_and_between() -> None:
    small = torch.logspace(-24, -1, 5000, base=2)
    x = torch.cat([small, 1 - small, torch.linspace(0.01, 17.0, 5000)])
    exact = x.double().log()
    error = (_log(x).double() - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error[exact != 0].max() < 5e-7
    assert _log(torch.ones(1)).item() == 0.0


def test_noise_has_the_mean_and_variance_of_gumbels_distribution() -> None:
    noise = gumbel_noise(keys_of(4), 0, 200_000)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    torch.testing.assert_close(noise.mean(1), torch.full((4,), 0.5772157), atol=0.015, rtol=0)
    torch.testing.assert_close(noise.var(1), torch.full((4,), math.pi**2 / 6), atol=0.03, rtol=0)


def test_the_noise_of_a_token_does_not_depend_on_where_its_shard_begins_nor_on_the_other_rows() -> None:
    keys = keys_of(3)
    noise = gumbel_noise(keys, 0, 5000)
    for first, count in ((0, 1), (1, 7), (1003, 777), (4999, 1)):
        assert gumbel_noise(keys, first, count).equal(noise[:, first : first + count])
    assert gumbel_noise(keys[1:2], 0, 5000).equal(noise[1:2])
