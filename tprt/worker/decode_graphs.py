"""Decode steps as CUDA graphs: one copy of their columns, one or two graph launches, sampling included.

A few batch sizes are captured, the largest first and all from one memory pool; a batch runs in the smallest
that holds it, with padding that writes to no KV slot. The parts of a step that graphs cannot hold (truncated
sampling, log-probabilities, adjusted logits) follow the captured forward pass eagerly.

Knows nothing of prefills: those run eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tprt.context import Context, reset_context, set_context
from tprt.layers.noise import noise_keys
from tprt.layers.sampler import Sampler, SamplingBatch
from tprt.messages import StepInput
from tprt.models import DecoderForCausalLM
from tprt.worker.block_table_mirror import BlockTableMirror
from tprt.worker.input_batch import (
    InputBuilder,
    block_table_bounds,
    padded_block_tables,
    slot_mapping_of,
    token_positions,
    truncated_rows,
)
from tprt.worker.step_transfer import StepTransfer, staged_bytes, wait_for

_NUM_PINNED = 2
# Kernels that read 16 bytes at a time want their operands there.
_ALIGNMENT = 16


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture, in rising order: close to each other where steps are short."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256]
    sizes += range(320, max_num_seqs, 64)
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def is_decode(step: StepInput) -> bool:
    """Whether every sequence of `step` has one token to compute and one to sample."""
    return step.num_decodes == len(step.query_lens) and bool(step.samples.all())


class DecodeColumns:
    """The columns of a decode of `size` sequences, side by side in the bytes of `memory`."""

    def __init__(self, memory: Tensor, size: int) -> None:
        self._memory = memory
        self._start = 0
        self.size = size
        self.token_ids = self._column(torch.int64)
        self.positions = self._column(torch.int64)
        self.slot_mapping = self._column(torch.int64)
        self.slots = self._column(torch.int64)
        self.noise_keys = self._column(torch.int64)
        self.changed_places = self._column(torch.int64)
        self.temperatures = self._column(torch.float32)
        self.context_lens = self._column(torch.int32)
        self.changed_values = self._column(torch.int32)
        self.num_bytes = self._start

    def copy_from(self, memory: Tensor) -> None:
        """Take over all columns from the same layout in pinned `memory`; nothing waits for it."""
        self._memory[: self.num_bytes].copy_(memory[: self.num_bytes], non_blocking=True)

    @staticmethod
    def bytes_for(size: int) -> int:
        """Return the bytes of a batch of `size`."""
        return 6 * 8 * size + 3 * 4 * size + 9 * _ALIGNMENT

    def _column(self, dtype: torch.dtype) -> Tensor:
        start = -(-self._start // _ALIGNMENT) * _ALIGNMENT
        self._start = start + self.size * dtype.itemsize
        return self._memory[start : self._start].view(dtype)


@dataclass(frozen=True, slots=True)
class _Captured:
    """The graphs of one batch size and the tensors that they leave their results in.

    Logits are not among those: they are as large as all the rest, and each size would keep its own.
    """

    columns: DecodeColumns
    forward: torch.cuda.CUDAGraph
    sample: torch.cuda.CUDAGraph
    hidden: Tensor
    token_ids: Tensor


class DecodeGraphs:
    """Captured decode steps of one rank."""

    def __init__(
        self,
        model: DecoderForCausalLM,
        sampler: Sampler,
        inputs: InputBuilder,
        tables: BlockTableMirror,
        block_size: int,
        max_model_len: int,
    ) -> None:
        """Assign only; `capture` does the work."""
        self._model = model
        self._sampler = sampler
        self._inputs = inputs
        self._tables = tables
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._captured: dict[int, _Captured] = {}
        self._sizes = [0]
        self._host: _HostColumns
        self._changes = StepTransfer(tables.device_tables.device)

    def rehearse(self, sizes: list[int]) -> None:
        """Run a decode of every size as `capture` does before it captures it."""
        memory = self._device_memory(sizes)
        for size in sizes:
            self._run_padding(DecodeColumns(memory, size))

    def capture(self, sizes: list[int]) -> None:
        """Capture a decode of every size; all ranks together."""
        device = self._tables.device_tables.device
        self._sizes = sorted(sizes)
        self._host = _HostColumns(self._sizes[-1], device)
        memory = self._device_memory(sizes)
        pool: Any = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for size in reversed(self._sizes):
                self._captured[size] = self._capture_one(DecodeColumns(memory, size), pool, stream)
        torch.cuda.current_stream(device).wait_stream(stream)

    def _capture_one(self, columns: DecodeColumns, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        # Once without a graph: kernels are compiled and libraries set up where capturing would forbid it.
        self._run_padding(columns)
        forward, hidden = _record(lambda: self._forward(columns), pool, stream)
        sample, token_ids = _record(lambda: self._sample(columns, hidden), pool, stream)
        return _Captured(columns, forward, sample, hidden, token_ids)

    def _device_memory(self, sizes: list[int]) -> Tensor:
        num_bytes = DecodeColumns.bytes_for(max(sizes))
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._tables.device_tables.device)

    def _run_padding(self, columns: DecodeColumns) -> None:
        self._clear(columns)
        self._sample(columns, self._forward(columns))

    def _clear(self, columns: DecodeColumns) -> None:
        """Make a batch of padding: no token is written, no sequence is read."""
        for column in (columns.token_ids, columns.positions, columns.noise_keys, columns.changed_values):
            column.zero_()
        columns.slot_mapping.fill_(-1)
        columns.slots.fill_(self._tables.padding_row)
        columns.changed_places.fill_(self._tables.padding_row * self._tables.width)
        columns.temperatures.zero_()
        columns.context_lens.zero_()

    def _forward(self, columns: DecodeColumns) -> Tensor:
        from tprt.kernels.begin_decode import begin_decode

        changes = columns.changed_places, columns.changed_values
        last, tables = self._inputs.last_token_ids, self._tables.device_tables
        token_ids, block_tables = begin_decode(columns.token_ids, last, columns.slots, tables, changes)
        context = Context(
            slot_mapping=columns.slot_mapping,
            context_lens=columns.context_lens,
            block_tables=block_tables,
            max_seqlen_k=self._max_model_len,
        )
        set_context(context)
        try:
            hidden: Tensor = self._model(token_ids, columns.positions)
            return hidden
        finally:
            reset_context()

    def _sample(self, columns: DecodeColumns, hidden: Tensor) -> Tensor:
        batch = SamplingBatch(
            temperatures=columns.temperatures,
            top_ks=columns.token_ids,
            top_ps=columns.temperatures,
            min_ps=columns.temperatures,
            noise_keys=columns.noise_keys,
            num_top=None,
            any_random=True,
            any_truncated=False,
        )
        token_ids: Tensor = self._sampler(self._model.compute_logits(hidden), batch).token_ids
        self._inputs.keep_sampled(columns.slots, token_ids)
        return token_ids

    def fits(self, step: StepInput) -> bool:
        """Whether `step` is a decode of a size that has been captured."""
        return is_decode(step) and len(step.query_lens) <= self._sizes[-1]

    def run(self, step: StepInput) -> tuple[Tensor, Tensor | None]:
        """Run `step`; return its hidden states `[S, H]` and, where a graph chooses them, its tokens `[S]`."""
        num_seqs = len(step.query_lens)
        captured = self._captured[self._sizes[bisect_left(self._sizes, num_seqs)]]
        self._send(step, captured.columns)
        captured.forward.replay()
        if not _samples_simply(step):
            return captured.hidden[:num_seqs], None
        captured.sample.replay()
        return captured.hidden[:num_seqs], captured.token_ids[:num_seqs]

    def _send(self, step: StepInput, there: DecodeColumns) -> None:
        here, memory = self._host.next(there.size)
        padding_row = self._tables.padding_row
        positions = token_positions(step)
        num_blocks, starts = block_table_bounds(step, self._block_size)
        places, values = self._tables.changes(
            step.seq_slots, padded_block_tables(step.block_ids, starts, num_blocks)
        )
        if len(places) > there.size:
            self._write_now(places, values)
            places, values = places[:0], values[:0]
        _fill(here.token_ids, step.token_ids, 0)
        _fill(here.positions, positions, 0)
        _fill(here.slot_mapping, slot_mapping_of(step, positions, starts, self._block_size), -1)
        _fill(here.slots, step.seq_slots, padding_row)
        _fill(here.noise_keys, noise_keys(step.seeds, step.context_lens), 0)
        _fill(here.changed_places, places, padding_row * self._tables.width)
        _fill(here.changed_values, values, 0)
        _fill(here.temperatures, step.temperatures, 0.0)
        _fill(here.context_lens, step.context_lens, 0)
        self._host.send(memory, there)

    def _write_now(self, places: NDArray[np.int64], values: NDArray[np.int32]) -> None:
        """Write more changes than a decode's columns hold: sequences that come from a prefill."""
        self._changes.begin(staged_bytes(places.nbytes + values.nbytes, num_columns=2))
        columns = self._changes.stage(places), self._changes.stage(values)
        self._changes.flush()
        self._tables.write(*columns)


class _HostColumns:
    """Columns in pinned memory, of which one set is written while the device reads the other."""

    def __init__(self, largest: int, device: torch.device) -> None:
        self._device = device
        size = DecodeColumns.bytes_for(largest)
        self._memory = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_PINNED)]
        self._was_read = [_event() for _ in self._memory]
        self._columns: list[dict[int, DecodeColumns]] = [{} for _ in self._memory]
        self._turn = 0

    def next(self, size: int) -> tuple[DecodeColumns, int]:
        """Return columns that may be written, and which set they are."""
        self._turn = turn = (self._turn + 1) % _NUM_PINNED
        wait_for(self._was_read[turn])
        columns = self._columns[turn].get(size)
        if columns is None:
            columns = self._columns[turn][size] = DecodeColumns(self._memory[turn], size)
        return columns, turn

    def send(self, turn: int, there: DecodeColumns) -> None:
        """Copy set `turn` to the device's columns; nothing waits for it."""
        there.copy_from(self._memory[turn])
        self._was_read[turn].record(torch.cuda.current_stream(self._device))


def _samples_simply(step: StepInput) -> bool:
    """Whether one candidate a rank decides every row."""
    plain = not step.adjusts_logits and not (step.num_logprobs >= 0).any()
    return plain and not truncated_rows(step).any()


def _fill(column: Tensor, values: NDArray[np.generic], padding: float) -> None:
    there = column.numpy()
    there[: len(values)] = values
    there[len(values) :] = padding


def _record(
    work: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
