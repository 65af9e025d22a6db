"""Decodes of projected heads, by one kernel and by two of which each is tested by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.paged_attention import PagedBatch
from tprt.attention import AttentionBackend
from tprt.kernels.preparation import HeadNorms, Preparation


class PreparedDecodes:
    """The heads of a step of decodes behind the cached tokens of `batch`, whose newest ones are not in yet."""

    def __init__(self, batch: PagedBatch, has_norms: bool) -> None:
        shape, count = batch.shape, len(batch.lens)
        self.batch = batch
        self.counts = (shape.group * shape.kv_heads, shape.kv_heads)
        self.heads = batch.random(count, sum(self.counts) + shape.kv_heads, shape.head_dim)
        weights = [batch.random(shape.head_dim) for _ in range(2)]
        angles = batch.random(max(batch.lens), shape.head_dim // 2).float()
        self.how = Preparation(
            torch.cat([angles.cos(), angles.cos()], 1),
            torch.cat([-angles.sin(), angles.sin()], 1),
            torch.tensor(batch.lens, device=shape.device) - 1,
            HeadNorms(weights[0], weights[1], 1e-6) if has_norms else None,
        )
        self.newest = batch.newest_slots()
        self.context = batch.context(count)

    def fill_cache(self, backend: AttentionBackend) -> None:
        """Write what is cached; where the newest tokens belong stays what poisons any result."""
        self.batch.write(backend)
        self.batch.cache.flatten(1, 2)[:, self.newest] = 1e4

    def in_two(self, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
        """Prepare and store, then decode; return the result and the cache, which is a copy."""
        from tprt.kernels.qk_rotary import prepare_attention

        cache = self.batch.cache.clone()
        query = prepare_attention(self.heads.clone(), self.counts, self.how, (cache, self.newest), False)[0]
        return backend.decode(query, cache, self.context), cache

    def check(self, backend: AttentionBackend) -> None:
        """Do it in one, and compare within the rounding of a score: which reduction comes first is open."""
        self.fill_cache(backend)
        expected, expected_cache = self.in_two(backend)
        cache, heads = self.batch.cache, self.heads.clone()
        found = backend.prepare_and_decode(heads, self.how, cache, self.context)
        assert heads.equal(self.heads)
        old = torch.ones(cache.shape[1] * cache.shape[2], dtype=torch.bool)
        old[self.newest.cpu()] = False
        old = old.to(cache.device)
        assert cache.flatten(1, 2)[:, old].equal(expected_cache.flatten(1, 2)[:, old])
        eps = torch.finfo(cache.dtype).eps
        torch.testing.assert_close(cache, expected_cache, rtol=4 * eps, atol=8 * eps)
        torch.testing.assert_close(found, expected, rtol=16 * eps, atol=16 * eps)
