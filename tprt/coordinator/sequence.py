"""Sequences: one object for each request, and one row of a table for each that runs.

The table is a structure of arrays over the slots `0 ... max_num_seqs - 1`, so that a step over hundreds of
sequences is a few operations on whole columns. Knows nothing of policy: who runs and who waits is decided
elsewhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tprt.block_hash import NO_PARENT, hash_block
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.logit_adjuster import LogitAdjuster
from tprt.messages import Int32Array, SamplingParams

Slots = NDArray[np.intp]
NO_SLOTS: Slots = np.empty(0, np.intp)
# Stands for a token that the worker has sampled, or is about to, and that has not come back yet.
PENDING_TOKEN = -1
_NO_TOKEN = -1
_UNKNOWN = -1
_NO_POSITIONS = range(0)
# Below it a sequence is greedy, as in vLLM: logits divided by what is much smaller are infinite.
_LEAST_TEMPERATURE = 1e-5
# Rows of block tables are copied as wide as the longest, unless that is this many times what they hold.
_MAX_PADDING = 2


@dataclass(eq=False, slots=True)
class Sequence:
    """One request and, while it waits, its tokens.

    Attributes:
        key: the name that the caller gave it.
        request_id: the client's name for it.
        sampling: how its tokens are chosen and when they end.
        seed: seed of its noise.
        prompt_len: tokens of the prompt.
        token_ids: prompt and output so far, `[n]`; out of date while the sequence has a slot.
        arrived_ns: when it came, as the caller said.
        slot: its row of the table, or -1 while it waits.
        num_cached_tokens: prompt tokens that came from the prefix cache when it first ran; -1 before that.
        queue_s: how long it waited before it first ran; -1 before that.
        block_hashes: hashes of its leading full blocks, as far as they were needed.
        adjuster: what is done to its logits; None when nothing is.
        num_scored: leading positions of the prompt that need not be scored again: the log-probability of the
            token after each has been sent to the client.
    """

    key: Hashable
    request_id: int
    sampling: SamplingParams
    seed: int
    prompt_len: int
    token_ids: Int32Array
    arrived_ns: int = 0
    slot: int = -1
    num_cached_tokens: int = _UNKNOWN
    queue_s: float = _UNKNOWN
    block_hashes: list[bytes] = field(default_factory=list)
    adjuster: LogitAdjuster | None = None
    num_scored: int = 0

    @property
    def positions_to_score(self) -> range:
        """Positions of the prompt that must be computed, for the log-probability of the token after each."""
        if self.sampling.prompt_logprobs is None:
            return _NO_POSITIONS
        return range(self.num_scored, self.prompt_len - 1)

    def hash_blocks(self, token_ids: Int32Array, start: int, end: int, block_size: int) -> Iterator[bytes]:
        """Yield the hashes of blocks `start ... end - 1`, which `token_ids` must fill.

        Hashes are computed when they are asked for, and kept.
        """
        hashes = self.block_hashes
        for index in range(start, end):
            if index == len(hashes):
                tokens = token_ids[index * block_size : (index + 1) * block_size]
                hashes.append(hash_block(hashes[-1] if hashes else NO_PARENT, tokens.tobytes()))
            yield hashes[index]


class SequenceTable:
    """The rows of the running sequences.

    Every attribute is a column; `N` is `max_num_seqs`. A row means something only while a sequence has it.

    Attributes:
        sequences: `[N]` who has the row.
        keys: `[N]` their keys, as an array of objects.
        token_ids: `[N, max_sequence_len]` prompt and output; `PENDING_TOKEN` where not known yet.
        num_tokens: `[N]` tokens of each, pending ones included.
        num_computed_tokens: `[N]` tokens whose KV is there, or will be after the steps in flight.
        block_tables: `[N, max_blocks_per_seq]` KV blocks.
        num_blocks: `[N]` KV blocks of each.
        num_known_blocks: `[N]` leading blocks that the prefix cache has been told of.
        in_flight: `[N]` steps in flight that use the row.
        ended: `[N]` the sequence is over; the row is kept for the steps in flight.
        max_tokens: `[N]` length at which each ends.
        stop_ids: `[N, w]` tokens that end each, padded with -1; `w` grows as needed.
        request_ids, num_cached_tokens: `[N]` for the answers.
        queue_s: `[N]` for the next answer; -1 once it was told.
        temperatures, top_ks, top_ps, min_ps, seeds, num_logprobs: `[N]` as in `StepInput`.
        is_adjusted: `[N]` something is done to the logits of each.
        needs_newest: `[N]` its next step needs its newest token here, not only on the ranks.
        num_adjusted: rows of which something is done to the logits: mostly none, which is soon known.
        is_scored: `[N]` log-probabilities of prompt tokens of each are still to be sent.
        num_scored: rows of which that is so; mostly none.
    """

    def __init__(self, limits: SchedulerLimits, eos_token_ids: tuple[int, ...]) -> None:
        n = limits.max_num_seqs
        self._eos_token_ids = eos_token_ids
        self._max_sequence_len, self._block_size = limits.max_sequence_len, limits.block_size
        # Popped from the end: the lowest free row is taken first.
        self._free_slots = list(range(n - 1, -1, -1))
        self.sequences: list[Sequence | None] = [None] * n
        self.keys = np.empty(n, object)
        # Memory of rows and columns that are never used is never touched, and so costs nothing.
        self.token_ids = np.empty((n, limits.max_sequence_len), np.int32)
        self.block_tables = np.empty((n, limits.max_blocks_per_seq), np.int32)
        self.stop_ids = np.empty((n, max(1, len(eos_token_ids))), np.int32)
        self.num_tokens, self.num_computed_tokens = _column(n), _column(n)
        self.num_blocks, self.num_known_blocks = _column(n), _column(n)
        self.in_flight, self.max_tokens = _column(n), _column(n)
        self.ended = np.zeros(n, np.bool_)
        self.num_cached_tokens, self.num_logprobs, self.top_ks = _column(n), _column(n), _column(n)
        self.request_ids, self.seeds = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.temperatures, self.top_ps, self.min_ps = (np.zeros(n, np.float32) for _ in range(3))
        self.queue_s = np.zeros(n, np.float32)
        self.is_adjusted, self.needs_newest = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        self.num_adjusted = 0
        self.is_scored = np.zeros(n, np.bool_)
        self.num_scored = 0

    @property
    def num_free_slots(self) -> int:
        """Rows that no sequence has."""
        return len(self._free_slots)

    def place(self, sequence: Sequence, blocks: list[int], num_computed_tokens: int) -> int:
        """Give `sequence` a row and `blocks`, whose first `num_computed_tokens` tokens are there already."""
        slot = sequence.slot = self._free_slots.pop()
        num_tokens = len(sequence.token_ids)
        self.sequences[slot], self.keys[slot] = sequence, sequence.key
        self.token_ids[slot, :num_tokens] = sequence.token_ids
        self.num_tokens[slot] = num_tokens
        self.num_computed_tokens[slot] = num_computed_tokens
        self.block_tables[slot, : len(blocks)] = blocks
        self.num_blocks[slot] = len(blocks)
        self.num_known_blocks[slot] = num_computed_tokens // self._block_size
        self.in_flight[slot], self.ended[slot] = 0, False
        self.request_ids[slot] = sequence.request_id
        self.num_cached_tokens[slot], self.queue_s[slot] = sequence.num_cached_tokens, sequence.queue_s
        self._place_sampling(slot, sequence)
        return slot

    def note_queue_time(self, sequence: Sequence, waited_s: float) -> None:
        """Note how long a sequence has waited; its next answer will tell."""
        sequence.queue_s = waited_s
        if sequence.slot >= 0:
            self.queue_s[sequence.slot] = waited_s

    def remove(self, slot: int) -> Sequence:
        """Take the row from its sequence, which keeps its known tokens."""
        sequence = self.sequence(slot)
        sequence.token_ids = self.known_tokens(slot).copy()
        sequence.slot = -1
        self.num_adjusted -= bool(self.is_adjusted[slot])
        self.num_scored -= bool(self.is_scored[slot])
        self.sequences[slot], self.keys[slot] = None, None
        self._free_slots.append(slot)
        return sequence

    def sequence(self, slot: int) -> Sequence:
        """Return who has the row."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def note_scored(self, slot: int, count: int) -> None:
        """Take note of log-probabilities that are sent for the next `count` prompt tokens of a row."""
        sequence = self.sequence(slot)
        sequence.num_scored += count
        if not sequence.positions_to_score:
            self.is_scored[slot] = False
            self.num_scored -= 1

    def lacking(self, slots: Slots) -> Int32Array:
        """Return the tokens `[S]` of each row that have not been computed."""
        return self.num_tokens[slots] - self.num_computed_tokens[slots]

    def known_tokens(self, slot: int) -> Int32Array:
        """Return the tokens of a row up to the first pending one: a view, `[n]`."""
        tokens = self.token_ids[slot, : self.num_tokens[slot]]
        num_pending = 0
        while num_pending < len(tokens) and tokens[-1 - num_pending] == PENDING_TOKEN:
            num_pending += 1
        return tokens[: len(tokens) - num_pending]

    def blocks(self, slot: int) -> Int32Array:
        """Return the block table of a row: a view, `[n]`."""
        return self.block_tables[slot, : self.num_blocks[slot]]

    def block_ids(self, slots: Slots, num_blocks: Int32Array) -> Int32Array:
        """Return the first `num_blocks` `[S]` entries of each row's block table, end to end."""
        widest = int(num_blocks.max())
        if widest * len(slots) > _MAX_PADDING * int(num_blocks.sum()):
            return self._block_ids_one_by_one(slots, num_blocks)
        rows = self.block_tables[slots, :widest]
        return rows[np.arange(widest, dtype=np.int32) < num_blocks[:, None]]

    def _block_ids_one_by_one(self, slots: Slots, num_blocks: Int32Array) -> Int32Array:
        """Do the same by an index for each entry, whose time does not depend on the longest row."""
        ends = np.cumsum(num_blocks)
        starts = slots * self.block_tables.shape[1]
        index = np.repeat(starts - ends + num_blocks, num_blocks)
        index += np.arange(len(index))
        return self.block_tables.ravel().take(index)

    def _place_sampling(self, slot: int, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self.max_tokens[slot] = min(sequence.prompt_len + sampling.max_tokens, self._max_sequence_len)
        is_random = sampling.temperature >= _LEAST_TEMPERATURE
        self.temperatures[slot] = sampling.temperature if is_random else 0.0
        self.top_ks[slot] = sampling.top_k
        self.top_ps[slot], self.min_ps[slot] = sampling.top_p, sampling.min_p
        self.seeds[slot] = sequence.seed
        self.num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        adjuster = sequence.adjuster
        self.is_adjusted[slot] = adjuster is not None
        self.needs_newest[slot] = adjuster is not None and adjuster.needs_newest
        self.num_adjusted += adjuster is not None
        self.is_scored[slot] = bool(sequence.positions_to_score)
        self.num_scored += bool(sequence.positions_to_score)
        stop_ids = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_token_ids))
        if len(stop_ids) > self.stop_ids.shape[1]:
            wider = len(stop_ids) - self.stop_ids.shape[1]
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, wider)), constant_values=_NO_TOKEN)
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
        self.stop_ids[slot, len(stop_ids) :] = _NO_TOKEN


def _column(n: int) -> Int32Array:
    return np.zeros(n, np.int32)


def draw_random_seed() -> int:
    """Return a seed for a request that brought none."""
    return secrets.randbits(63)
