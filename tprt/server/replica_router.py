"""Which replica takes a request: the one where it costs least, with what that one has in its prefix cache.

The cost of a request at a replica, in tokens:

    load + COMPUTE_WEIGHT * tokens to compute

* load: tokens of the replica's unfinished requests, those that wait included: the prompt, the output so far
  and, up to a bound, what may still come.
* tokens to compute: those of the prompt that are not in the replica's prefix cache.

So a request goes where its prefix is, until that replica is busier than another one by `COMPUTE_WEIGHT` times
the tokens that the prefix saves, which is about as many more requests with that prefix; then it is computed
there as well, and both have it. Of equal replicas the one is taken that was taken longest ago. A replica whose
ranks are being replaced is taken only when no other serves, and one that is lost never.

Sources. The form is that of NVIDIA Dynamo's KV-aware router, which adds weighted prefill blocks and active
decode blocks. SGLang's cache-aware router goes by the longest prefix until queue lengths differ by more than
two thresholds, and vLLM's data parallel client by 4 * waiting + running requests, without prefixes; one sum
in tokens needs no threshold, and a prefix of a few tokens cannot outweigh much load. Noting by block hashes
what was sent where, with least recently used ones forgotten, is how llm-d's approximate prefix scorer does
it.

Reads no clock and does no I/O; knows nothing of lanes and messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from tprt.block_hash import extend_hashes
from tprt.config import CacheConfig
from tprt.server.prefix_index import PrefixIndex

COMPUTE_WEIGHT = 16
"""How many tokens of load weigh as much as one to compute.

To read a token's KV in one step costs about a thousandth of computing it (8B on an H100: 50 ns, 35 us), and a
request that runs does so in each of some tens to hundreds of steps.
"""
_TOKEN_BYTES = 4


class ReplicaState(Enum):
    """Whether a replica can take requests."""

    STARTING = "starting"
    """Its ranks are not ready for the first time."""
    SERVING = "serving"
    REPLACING = "replacing"
    """Its ranks have failed, and others start; its requests wait for them."""
    LOST = "lost"
    """Its ranks have failed and are not replaced."""


@dataclass(slots=True)
class _Replica:
    state: ReplicaState = ReplicaState.STARTING
    turn: int = 0
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)


class ReplicaRouter:
    """Chooses among replicas, and remembers what it has sent where."""

    def __init__(self, num_replicas: int, block_size: int, caches_prefixes: bool) -> None:
        """Know nothing of any of them.

        Args:
            num_replicas: how many there are.
            block_size: tokens of a KV block.
            caches_prefixes: whether the replicas keep blocks of finished prompts.
        """
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._block_size = block_size
        self._caches_prefixes = caches_prefixes
        self._turn = 0

    @classmethod
    def for_cache(cls, cache: CacheConfig, num_replicas: int) -> ReplicaRouter:
        """Return the router of a deployment; prefixes are of no use to it where there is nothing to choose."""
        return cls(num_replicas, cache.block_size, cache.enable_prefix_caching and num_replicas > 1)

    def state(self, replica: int) -> ReplicaState:
        """Return the state of a replica."""
        return self._replicas[replica].state

    def serves(self, replica: int, num_blocks: int) -> None:
        """Note that a replica is ready, with `num_blocks` KV blocks that hold nothing yet."""
        known = self._replicas[replica]
        known.state = ReplicaState.SERVING
        known.prefixes.resize(num_blocks if self._caches_prefixes else 0)

    def is_replaced(self, replica: int) -> None:
        """Note that the ranks of a replica have failed, and their KV blocks with them."""
        self._replicas[replica].state = ReplicaState.REPLACING
        self._replicas[replica].prefixes.clear()

    def is_lost(self, replica: int) -> None:
        """Note that a replica will not serve any more."""
        self._replicas[replica].state = ReplicaState.LOST
        self._replicas[replica].prefixes.clear()

    def choose(self, hashes: Sequence[bytes], num_tokens: int, loads: Sequence[int]) -> int:
        """Return the replica for a prompt, and note that it goes there.

        Args:
            hashes: of the prompt's full blocks, from `hash_tokens`.
            num_tokens: of the prompt.
            loads: `EngineClient.load` of each replica.
        """
        replica = min(self._candidates(), key=lambda one: self._cost(one, hashes, num_tokens, loads[one]))
        self._turn += 1
        self._replicas[replica].turn = self._turn
        self.note(replica, hashes)
        return replica

    def note(self, replica: int, hashes: Sequence[bytes]) -> None:
        """Note that a replica has these leading blocks."""
        if self._caches_prefixes:
            self._replicas[replica].prefixes.add(hashes)

    def hash_tokens(self, token_ids: Sequence[int], hashes: Sequence[bytes] = ()) -> list[bytes]:
        """Return the hashes of the full blocks of `token_ids`, the first of which are in `hashes` already."""
        known = list(hashes)
        if self._caches_prefixes:
            token_bytes = np.array(token_ids, np.int32).tobytes()
            extend_hashes(known, token_bytes, self._block_size * _TOKEN_BYTES)
        return known

    def _candidates(self) -> list[int]:
        """Return the replicas that serve; without any, those that may serve later; in the end all."""
        for states in ((ReplicaState.SERVING,), (ReplicaState.STARTING, ReplicaState.REPLACING)):
            found = [number for number, known in enumerate(self._replicas) if known.state in states]
            if found:
                return found
        return list(range(len(self._replicas)))

    def _cost(self, replica: int, hashes: Sequence[bytes], num_tokens: int, load: int) -> tuple[int, int]:
        known = self._replicas[replica]
        # The last token of a prompt is computed in any case.
        num_cached = min(known.prefixes.count_known(hashes) * self._block_size, num_tokens - 1)
        return load + COMPUTE_WEIGHT * (num_tokens - num_cached), known.turn
