"""Parameters that know which part of which checkpoint tensor they hold.

Knows nothing of files: a loader reads off a parameter which bytes of which tensor go where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tprt.sharding import Range

ShardId = str | int | None


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """One checkpoint tensor's share of a parameter.

    Attributes:
        full_shape: shape of the whole tensor in the checkpoint.
        dim: the dimension that is cut.
        source: the part of `dim` that this rank holds.
        dest: where that part begins along `dim` of the parameter.
        shared: every rank needs a part of the same bytes, so that a host reads them once for all its ranks;
            the same on every rank.
    """

    full_shape: tuple[int, ...]
    dim: int
    source: Range
    dest: int = 0
    shared: bool = False


class ShardedParameter(nn.Parameter):
    """A parameter made of slices of checkpoint tensors, one for each shard id (None when there is one)."""

    shards: Mapping[ShardId, ShardSlice]


def sharded_parameter(shards: Mapping[ShardId, ShardSlice]) -> ShardedParameter:
    """Allocate the parameter that `shards` fill, in the default dtype and on the default device."""
    first = next(iter(shards.values()))
    shape = list(first.full_shape)
    shape[first.dim] = sum(part.source.size for part in shards.values())
    parameter = ShardedParameter(torch.empty(shape), requires_grad=False)
    parameter.shards = shards
    return parameter


def whole(*shape: int) -> ShardedParameter:
    """Allocate a parameter that every rank holds in full."""
    return sharded_parameter({None: whole_slice(shape)})


def whole_slice(shape: tuple[int, ...]) -> ShardSlice:
    """Return the slice that is all of a tensor, on every rank."""
    return ShardSlice(shape, 0, Range(0, shape[0]), shared=True)
