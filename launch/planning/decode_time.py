"""How long a decode step will take on some numbers of ranks, from memory bandwidth, kernels and all-reduces.

A step reads the weights of a rank and the keys and values of its sequences once, takes some time for the
kernels of every layer whatever they read, and sums twice a layer and once after the embedding; sampling
exchanges once more. The host's share and arithmetic are not counted. Knows nothing of where the figures come
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tprt.sharding import ModelShape, RankShard, ShardPlan


@dataclass(frozen=True, slots=True)
class Machine:
    """What the devices can do.

    Attributes:
        bandwidth_gbs: what one device reads from its memory, in GB/s.
        shares_memory: all ranks share one memory and its bandwidth, as CPU ranks of a host do.
        layer_us: from batch size to the microseconds that a layer takes besides reading and all-reduces.
        all_reduce_us: from number of ranks and bytes to the microseconds of one all-reduce.
    """

    bandwidth_gbs: float
    shares_memory: bool
    layer_us: Callable[[int], float]
    all_reduce_us: Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Batch:
    """`size` sequences with `context_len` tokens each, in a type of `itemsize` bytes."""

    size: int
    context_len: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """One step of one batch on `num_ranks` ranks, in milliseconds; every sequence gets a token from it."""

    num_ranks: int
    batch_size: int
    read_ms: float
    kernels_ms: float
    all_reduce_ms: float

    @property
    def total_ms(self) -> float:
        """Time of the step."""
        return self.read_ms + self.kernels_ms + self.all_reduce_ms

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences."""
        return self.batch_size * 1000 / self.total_ms


def predict_decode(plan: ShardPlan, batch: Batch, machine: Machine) -> DecodeTime:
    """Predict a step of `batch` on the ranks of `plan`."""
    sizes = [bytes_read(plan.shape, shard, batch) for shard in plan.shards]
    read_bytes = sum(sizes) if machine.shares_memory else max(sizes)
    message_bytes = batch.size * plan.shape.hidden_size * batch.itemsize
    return DecodeTime(
        num_ranks=plan.world_size,
        batch_size=batch.size,
        read_ms=read_bytes / machine.bandwidth_gbs / 1e6,
        kernels_ms=plan.shape.num_hidden_layers * machine.layer_us(batch.size) / 1e3,
        all_reduce_ms=num_exchanges(plan.shape) * machine.all_reduce_us(plan.world_size, message_bytes) / 1e3,
    )


def num_exchanges(shape: ModelShape) -> int:
    """Return how often ranks wait for each other in a step."""
    return 2 * shape.num_hidden_layers + 1 + 1


def slower_than_fewer(times: Sequence[DecodeTime]) -> list[tuple[DecodeTime, DecodeTime]]:
    """Return each time of a batch that a smaller number of ranks beats, with the best of those."""
    slower = []
    for time in times:
        fewer = [t for t in times if t.batch_size == time.batch_size and t.num_ranks < time.num_ranks]
        best = min(fewer, key=lambda t: t.total_ms, default=None)
        if best is not None and best.total_ms < time.total_ms:
            slower.append((time, best))
    return slower


def bytes_read(shape: ModelShape, shard: RankShard, batch: Batch) -> int:
    """Return the bytes of weights, but for the embedding's table, of which few rows are read, and of KV."""
    lookup = 0 if shape.tie_word_embeddings else shard.vocab_rows.size * shape.hidden_size
    per_token = 2 * shard.kv_heads.size * shape.head_dim * shape.num_hidden_layers
    kv = batch.size * batch.context_len * per_token
    return (shard.weight_elements(shape) - lookup + kv) * batch.itemsize
