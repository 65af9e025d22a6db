"""Linear layers, whole or cut by columns or rows over ranks.

Every layer takes its ranges from the ShardPlan. Column layers keep rows of the weight (`narrow(0, ...)`) and
give this rank's part of the output; row layers keep columns (`narrow(1, ...)`) and sum over ranks. Knows
nothing of models and files.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor, nn

from tprt.distributed import TPGroup
from tprt.layers.packed_weight import PackedWeight, can_pack, multiply_plain
from tprt.layers.parameter import ShardedParameter, ShardId, ShardSlice, sharded_parameter, whole_slice
from tprt.sharding import Range


class LinearBase(nn.Module):
    """`y = x W^T + b` over this rank's part of the weight; subclasses say which part that is."""

    weight: ShardedParameter | None
    bias: ShardedParameter | None

    def __init__(self, weight: Mapping[ShardId, ShardSlice], bias: Mapping[ShardId, ShardSlice] | None) -> None:
        super().__init__()
        self.weight = sharded_parameter(weight)
        self.bias = None if bias is None else sharded_parameter(bias)
        self._packed: PackedWeight | None = None

    def process_weights_after_loading(self) -> None:
        """Put the weight into the layout that this device multiplies fastest, and drop the plain one."""
        if self.weight is not None and can_pack(self.weight):
            self._packed = PackedWeight(self.weight)
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[T, in]` to `[T, out]`, lower case for what this rank holds."""
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by this rank's part of the weight, with `bias` added."""
        if self._packed is not None:
            return self._packed.multiply(x, bias)
        assert self.weight is not None
        return multiply_plain(x, self.weight, bias)


class ReplicatedLinear(LinearBase):
    """Every rank holds all of the weight `[out, in]`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(
            {None: whole_slice((out_features, in_features))},
            {None: whole_slice((out_features,))} if bias else None,
        )


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel weights over the same input, multiplied as one.

    `outputs` gives, for each shard id, the size of the whole output and the range that this rank keeps; the
    output is the concatenation of the ranges in that order. `shared` names those of which several ranks keep
    the same rows.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[ShardId, tuple[int, Range]],
        bias: bool = False,
        shared: Container[ShardId] = (),
    ) -> None:
        weight: dict[ShardId, ShardSlice] = {}
        biases: dict[ShardId, ShardSlice] = {}
        dest = 0
        for shard_id, (size, rows) in outputs.items():
            is_shared = shard_id in shared
            weight[shard_id] = ShardSlice((size, in_features), 0, rows, dest, is_shared)
            biases[shard_id] = ShardSlice((size,), 0, rows, dest, is_shared)
            dest += rows.size
        super().__init__(weight, biases if bias else None)
        self.output_sizes = [rows.size for _, rows in outputs.values()]


class ColumnParallelLinear(MergedColumnParallelLinear):
    """This rank computes the outputs `rows` of `out_features`."""

    def __init__(self, in_features: int, out_features: int, rows: Range, bias: bool = False) -> None:
        super().__init__(in_features, {None: (out_features, rows)}, bias)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections as one; shard ids `"q"`, `"k"`, `"v"`, ranges in heads.

    `heads` and `kv_heads` are the number of the whole model and the range of this rank. `kv_is_replicated`
    says that several ranks may hold the same KV head.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        heads: tuple[int, Range],
        kv_heads: tuple[int, Range],
        bias: bool = False,
        kv_is_replicated: bool = False,
    ) -> None:
        q, kv = ((total * head_dim, _scaled(own, head_dim)) for total, own in (heads, kv_heads))
        super().__init__(hidden_size, {"q": q, "k": kv, "v": kv}, bias, ("k", "v") if kv_is_replicated else ())


class RowParallelLinear(LinearBase):
    """This rank multiplies the inputs `columns` of `in_features`; the result is summed over ranks.

    The bias is added once, after the sum.
    """

    def __init__(
        self, in_features: int, out_features: int, columns: Range, group: TPGroup, bias: bool = False
    ) -> None:
        super().__init__(
            {None: ShardSlice((out_features, in_features), 1, columns, shared=True)},
            {None: whole_slice((out_features,))} if bias else None,
        )
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[T, in]` (this rank's columns) to `[T, H]`, the full sum on every rank."""
        if self._group.world_size == 1:
            return self.multiply(x, self.bias)
        total = self._group.all_reduce(self.multiply(x, None))
        return total if self.bias is None else total.add_(self.bias)


def _scaled(heads: Range, head_dim: int) -> Range:
    return Range(heads.start * head_dim, heads.stop * head_dim)
