"""Continuous batching: which sequences compute which tokens in the next step.

Every running sequence that only lacks its newest token is in every step (a decode); what is left of the token
budget goes to prompts, in chunks, oldest first; then waiting sequences are admitted, first come, first
served. When blocks run out, the sequence that was admitted last is preempted: it goes back to the head of the
queue with the tokens it has, and is computed again. Requests that are isolated come before all others, one
after the other, each in steps of its own.

Does no I/O and reads no clock: the same calls give the same steps.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from tprt.coordinator.adjustment_columns import failed_grammars
from tprt.coordinator.engine_counters import EngineCounters
from tprt.coordinator.grammar import GrammarCompiler
from tprt.coordinator.intake import Intake
from tprt.coordinator.kv_allocation import KVAllocation
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.result import StepResult, find_finish_reasons, make_result
from tprt.coordinator.sequence import NO_SLOTS, Sequence, SequenceTable, Slots, draw_random_seed
from tprt.coordinator.step import Batch, StepInFlight, advance, build_step_input, make_batch, share_budget
from tprt.errors import InvalidRequestError
from tprt.messages import AddRequest, FinishReason, StepInput, StepOutput

# As numpy's own type: a comparison with the enum takes three times as long.
_NOT_FINISHED = np.uint8(FinishReason.NONE)


class Scheduler:
    """All unfinished sequences of one engine, and the KV blocks they share.

    `schedule` and `update` take turns; `schedule_ahead` puts one more step in flight before the tokens of the
    last are back, where nothing but those tokens is missing. `counters` holds what it has done, and what its
    caller counts there: steps.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        epoch: int = 0,
        draw_seed: Callable[[], int] = draw_random_seed,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._intake = Intake(eos_token_ids, vocab_size, draw_seed, grammars)
        self._sequences: dict[Hashable, Sequence] = {}
        self._waiting: OrderedDict[Hashable, Sequence] = OrderedDict()
        self._isolated: list[Hashable] = []
        self.counters = EngineCounters()
        self._start_epoch(epoch)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._next_step = 0
        self._table = SequenceTable(self._limits, self._eos_token_ids)
        self._kv = KVAllocation(self._table, self._limits, self.counters)
        # Slots in the order in which their sequences were admitted.
        self._running = NO_SLOTS
        self._in_flight: deque[StepInFlight] = deque()

    @property
    def limits(self) -> SchedulerLimits:
        """What this scheduler keeps to."""
        return self._limits

    @property
    def epoch(self) -> int:
        """The worker group that steps are made for."""
        return self._epoch

    @property
    def has_unfinished(self) -> bool:
        """Tell whether any request is unfinished."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot and go on."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot or for blocks."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._kv.num_free

    def unfinished_keys(self) -> list[Hashable]:
        """Return the keys of all requests that have not ended."""
        return list(self._sequences)

    def keys_in_flight(self) -> list[Hashable]:
        """Return the keys of the unfinished requests that are in a step in flight, each once."""
        keys = dict.fromkeys(key for step in self._in_flight for key in self._table.keys[step.slots].tolist())
        return [key for key in keys if key in self._sequences]

    def isolate(self, keys: Iterable[Hashable]) -> None:
        """Run these requests, and from now on only these, in steps of their own, before all others."""
        self._isolated = list(keys)

    @property
    def oldest_waiting_ns(self) -> int:
        """When the request at the head of the queue came, as it was told; 0 when none waits."""
        return next(iter(self._waiting.values())).arrived_ns if self._waiting else 0

    def add(self, key: Hashable, request: AddRequest, arrived_ns: int = 0) -> None:
        """Queue a request under `key`, which came at `arrived_ns`.

        Raises:
            InvalidRequestError: the key is in use, or the request could never be served.
        """
        if key in self._sequences:
            raise InvalidRequestError(f"request id {request.request_id} is that of one that has not ended")
        sequence = self._intake.make_sequence(key, request, arrived_ns, self._limits)
        self._sequences[key] = self._waiting[key] = sequence

    def abort(self, key: Hashable) -> None:
        """Forget a request; its blocks stay untouched until no step in flight uses them."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        if sequence.slot < 0:
            del self._sequences[key], self._waiting[key]
        else:
            slots = np.array([sequence.slot], np.intp)
            self._end(slots)
            self._release_ended(slots)

    def schedule(self) -> StepInput | None:
        """Choose and start the next step; None when nothing can run."""
        assert not self._in_flight, "the output of the last step has not been brought back"
        sequence = self._next_isolated()
        batch = self._choose_from_all() if sequence is None else self._choose_alone(sequence)
        return None if batch is None else self._start(batch)

    def _start(self, batch: Batch) -> StepInput:
        step = build_step_input(self._table, batch, self._limits.block_size, self._epoch, self._next_step)
        self._in_flight.append(advance(self._table, batch.slots, step))
        self._next_step += 1
        return step

    def failed_in(self, step: StepInput) -> list[tuple[Hashable, str]]:
        """Return the requests of `step`, just started, that cannot go on, and why; to be aborted."""
        return failed_grammars(self._table, step) if len(step.grammar_rows) else []

    def schedule_ahead(self) -> StepInput | None:
        """Start the step after the one in flight, whose tokens are not back yet; None unless it is plain.

        Plain: nobody is isolated, nobody who waits could be admitted, every running sequence gets a token in
        the step in flight, and for none it must be known which. One that turns out to have ended by it runs
        once more, and that token is dropped.
        """
        table, slots = self._table, self._running
        if not self._limits.schedules_ahead or len(self._in_flight) != 1 or self._isolated:
            return None
        head = next(iter(self._waiting.values()), None)
        has_room = head is not None and table.num_free_slots > 0 and self._kv.can_place(head, len(slots))
        if has_room or (table.lacking(slots) != 1).any():
            return None
        slots = slots[table.num_tokens[slots] < table.max_tokens[slots]]
        needs_newest = table.num_adjusted > 0 and table.needs_newest[slots].any()
        if len(slots) == 0 or needs_newest or not self._kv.try_grow(slots):
            return None
        return self._start(Batch(slots, table.lacking(slots), len(slots)))

    def update(self, output: StepOutput) -> StepResult:
        """Take in the tokens of the oldest step in flight; end what they end."""
        step = self._in_flight.popleft()
        assert (output.epoch, output.step) == (self._epoch, step.step), "the output of another step"
        assert len(output.token_ids) == len(step.sampled_slots), "an output of the wrong length"
        table = self._table
        table.in_flight[step.slots] -= 1
        table.token_ids[step.sampled_slots, step.sampled_positions] = output.token_ids
        self._kv.register_computed(step)
        reasons = find_finish_reasons(table, step, output.token_ids)
        result = make_result(table, step, output, reasons)
        self._end(step.sampled_slots[reasons != _NOT_FINISHED])
        self._release_ended(step.slots)
        return result

    def reset_for_epoch(self, epoch: int) -> None:
        """Start anew with another worker group: nothing is cached or in flight, no token is lost.

        Unfinished sequences wait in the order in which they ran and waited.
        """
        waiting = [*map(self._table.remove, self._running.tolist()), *self._waiting.values()]
        self._waiting = OrderedDict((sequence.key, sequence) for sequence in waiting)
        self._start_epoch(epoch)

    def resize(self, num_blocks: int) -> list[Hashable]:
        """Go on with another number of KV blocks, right after `reset_for_epoch`; return what no longer fits."""
        assert not len(self._running), "blocks are in use"
        self._limits = dataclasses.replace(self._limits, num_blocks=num_blocks)
        self._start_epoch(self._epoch)
        return [key for key, s in self._waiting.items() if len(s.token_ids) >= self._limits.max_sequence_len]

    def check(self) -> None:
        """Assert that blocks, tables, slots and queues agree."""
        table = self._table
        self._kv.check()
        taken = [slot for slot, sequence in enumerate(table.sequences) if sequence is not None]
        going_on = [slot for slot in taken if not table.ended[slot]]
        assert sorted(self._running.tolist()) == going_on
        assert all(table.in_flight[slot] for slot in taken if table.ended[slot])
        keys = {*self._waiting, *(table.sequence(slot).key for slot in going_on)}
        assert keys == self._sequences.keys()
        assert len(keys) == len(self._waiting) + len(going_on)

    def _next_isolated(self) -> Sequence | None:
        while self._isolated and self._isolated[0] not in self._sequences:
            del self._isolated[0]
        return self._sequences[self._isolated[0]] if self._isolated else None

    def _choose_alone(self, sequence: Sequence) -> Batch:
        """Let one sequence compute what the budget allows; others give way if it has no room."""
        while sequence.slot < 0 and not self._try_admit(sequence, 0):
            self._preempt(int(self._running[-1]))
        slots = np.array([sequence.slot], np.intp)
        while not self._kv.try_grow(slots):
            self._preempt(int(self._running[self._running != sequence.slot][-1]))
        query_lens = share_budget(self._table.lacking(slots), self._limits.max_num_batched_tokens)
        return make_batch(self._table, slots, query_lens)

    def _choose_from_all(self) -> Batch | None:
        """Give every running sequence room for its newest token, and choose unless any had to give way."""
        preempted = False
        while not self._kv.try_grow(self._running):
            self._preempt(int(self._running[-1]))
            preempted = True
        return self._choose(may_admit=not preempted)

    def _preempt(self, slot: int) -> None:
        """Send a sequence back to the head of the queue."""
        self._running = self._running[self._running != slot]
        sequence = self._kv.release(slot)
        self._waiting[sequence.key] = sequence
        self._waiting.move_to_end(sequence.key, last=False)
        self.counters.num_preemptions += 1

    def _choose(self, may_admit: bool) -> Batch | None:
        """Share the token budget out: decodes, then prompts under way, then new ones."""
        budget = self._limits.max_num_batched_tokens
        lacking = self._table.lacking(self._running)
        if not (may_admit and self._waiting) and (lacking == 1).all():
            # Most steps: decodes alone, no prompt to share a budget with.
            return Batch(self._running, lacking, len(lacking)) if len(lacking) else None
        query_lens = share_budget(lacking, budget)
        if may_admit and self._waiting:
            self._admit(budget - int(query_lens.sum()))
            query_lens = share_budget(self._table.lacking(self._running), budget)
        if len(query_lens) == 0:
            return None
        in_step = query_lens > 0
        return make_batch(self._table, self._running[in_step], query_lens[in_step])

    def _admit(self, budget: int) -> None:
        """Give rows to waiting sequences in their order, as long as there are tokens, rows and blocks."""
        while budget > 0 and self._waiting:
            # With a block left for each that runs, none must give way before it has filled it.
            if not self._try_admit(next(iter(self._waiting.values())), num_reserved=len(self._running)):
                break
            budget -= int(self._table.lacking(self._running[-1:])[0])

    def _try_admit(self, sequence: Sequence, num_reserved: int) -> bool:
        """Let a waiting sequence run if there are a row and its blocks, and `num_reserved` blocks besides."""
        slot = self._kv.try_place(sequence, num_reserved) if self._table.num_free_slots else None
        if slot is None:
            return False
        del self._waiting[sequence.key]
        self._running = np.append(self._running, slot)
        return True

    def _end(self, slots: Slots) -> None:
        """End the sequences of `slots` that have not ended yet."""
        for slot in slots[~self._table.ended[slots]].tolist():
            del self._sequences[self._table.sequence(slot).key]
            self._table.ended[slot] = True
        if len(slots):
            self._running = self._running[~self._table.ended[self._running]]

    def _release_ended(self, slots: Slots) -> None:
        """Free what ended sequences held, except where a step in flight still uses it."""
        table = self._table
        for slot in slots[table.ended[slots] & (table.in_flight[slots] == 0)].tolist():
            self._kv.release(slot)
