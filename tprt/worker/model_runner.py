"""The model of one rank: built from the plan, loaded, given KV blocks, and run step by step.

Knows nothing of where steps come from and where outputs go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from tprt.attention import AttentionSetup, make_attention_backend
from tprt.checkpoint_config import CheckpointConfig, resolve_max_model_len
from tprt.config import Config
from tprt.context import reset_context, set_context
from tprt.distributed import TPGroup
from tprt.host_limits import available_bytes
from tprt.layers.embedding import ParallelLMHead
from tprt.layers.linear import LinearBase
from tprt.layers.sampler import Sampled, Sampler
from tprt.log import get_logger
from tprt.messages import StepInput, StepOutput
from tprt.models import DecoderForCausalLM, ModelParts, build_model
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights import LoadExchange, LoadReport, load_dummy_weights, load_model
from tprt.worker.block_table_mirror import BlockTableMirror
from tprt.worker.compiling import compiling_kernels
from tprt.worker.decode_graphs import DecodeGraphs, graph_sizes
from tprt.worker.input_batch import InputBatch, InputBuilder
from tprt.worker.kv_cache import (
    allocate_kv_cache,
    allocate_on_all_ranks,
    cpu_budget,
    kv_block_bytes,
    num_blocks_that_fit,
    release_kv_cache,
    require_host_memory,
)
from tprt.worker.memory_budget import CudaMemory, MemoryBudget, measure_budget
from tprt.worker.output_transfer import OutputTransfer, PendingOutput
from tprt.worker.prompt_logprobs import compute_prompt_logprobs
from tprt.worker.rehearsal import steps_to_rehearse
from tprt.worker.workspace import largest_step

_LOG = get_logger(__name__)
OnProgress = Callable[[int, int], None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _tell_nobody(done_bytes: int, total_bytes: int) -> None:
    pass


def _do_nothing() -> None:
    pass


def resolve_dtype(config: Config, checkpoint: CheckpointConfig, device: torch.device) -> torch.dtype:
    """Return the type to compute in: the one set, or the checkpoint's, or float32 on a CPU."""
    name = config.model.dtype
    if name != "auto":
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else _DTYPES.get(checkpoint.dtype, torch.bfloat16)


class ModelRunner:
    """One rank's model and its KV blocks."""

    def __init__(
        self,
        config: Config,
        checkpoint: CheckpointConfig,
        group: TPGroup,
        device: torch.device,
        num_sharers: int = 1,
    ) -> None:
        """Build what needs no weights; `num_sharers` ranks, this one included, are on `device`."""
        self._config = config
        self._checkpoint = checkpoint
        self._group = group
        self._device = device
        self._num_sharers = num_sharers
        self._memory = CudaMemory(device, num_sharers, group.barrier if num_sharers > 1 else _do_nothing)
        self._dtype = resolve_dtype(config, checkpoint, device)
        self._max_model_len = resolve_max_model_len(checkpoint, config.model.max_model_len)
        self._plan = make_shard_plan(
            shape_of(checkpoint), config.parallel.tensor_parallel_size, config.parallel.rank_weights
        )
        self._shard = self._plan.shards[group.rank]
        self._sampler = Sampler(group, [shard.vocab_rows for shard in self._plan.shards])
        self._inputs = InputBuilder(
            config.cache.block_size, config.scheduler.max_num_seqs, device, self._shard.vocab_rows
        )
        self._outputs = OutputTransfer(config.scheduler.max_num_seqs, device)
        self._captures = False
        self._graphs: DecodeGraphs | None = None
        self.model: DecoderForCausalLM

    def load(self, exchange: LoadExchange | None = None, on_progress: OnProgress = _tell_nobody) -> int:
        """Build the model and fill it; return the bytes of this rank's weights.

        `exchange` joins the ranks of this host, and `on_progress` is told (bytes in place, of how many).
        """
        head_dim = self._checkpoint.head_dim
        setup = AttentionSetup(self._device, self._dtype, head_dim, self._config.cache.block_size)
        backend = make_attention_backend(self._config.runtime.attention_backend, head_dim**-0.5, setup)
        self._captures = (
            self._device.type == "cuda"
            and backend.capturable
            and self._group.capturable
            and not self._config.runtime.enforce_eager
        )
        parts = ModelParts(self._checkpoint, self._shard, self._group, backend, self._max_model_len)
        self.model = build_model(parts, self._dtype, self._device)
        with compiling_kernels(next(self.model.parameters()), self._rehearse):
            if self._config.model.load_format == "dummy":
                load_dummy_weights(self.model)
            else:
                num_here = 1 if exchange is None else exchange.world_size
                needs_all = num_here == self._group.world_size
                _log_load(load_model(self.model, self._config.model.path, exchange, on_progress, needs_all))
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        for module in self.model.modules():
            if isinstance(module, LinearBase | ParallelLMHead):
                module.process_weights_after_loading()
        return weight_bytes

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Launch what is to be compiled, in one layer and on this rank alone; weights may be anything."""
        scheduler, block_size = self._config.scheduler, self._config.cache.block_size
        with self.model.model.only_first_layer(), self._group.disjoined():
            allocate_kv_cache(self.model, 1, block_size)
            try:
                for step in steps_to_rehearse(scheduler, self._max_model_len, block_size):
                    self._forward(self._inputs.build(step))
                if self._captures:
                    self._make_graphs().rehearse(graph_sizes(scheduler.max_num_seqs))
            except torch.OutOfMemoryError:
                _LOG.warning("no room to rehearse the largest step: what it launches is compiled when it runs")
            finally:
                release_kv_cache(self.model)

    def allocate_kv_blocks(self) -> tuple[int, int]:
        """Allocate the KV blocks that the poorest rank can hold; return their number and this rank's bytes.

        Raises:
            ConfigError: none fits, or not as many as are set; says where the memory went.
        """
        block_size, budget = self._config.cache.block_size, None
        fitting = self._config.cache.num_blocks
        if fitting is None:
            budget = self._memory_budget()
            fitting = self._num_blocks_that_fit(budget)
        if self._device.type == "cpu":
            require_host_memory(fitting, self._block_bytes(), self._num_sharers, available_bytes())
        num_blocks, kv_bytes = allocate_on_all_ranks(
            allocate=lambda number: allocate_kv_cache(self.model, number, block_size),
            release=lambda: release_kv_cache(self.model),
            least_of=self._group.min_int,
            num_blocks=self._group.min_int(fitting),
        )
        if budget is not None and self._device.type != "cpu":
            _LOG.info("memory of %s:\n  %s", self._device, "\n  ".join(budget.table(kv_bytes)))
        if self._captures:
            self._capture_graphs()
        return num_blocks, kv_bytes

    def _capture_graphs(self) -> None:
        started_s, sizes = time.monotonic(), graph_sizes(self._config.scheduler.max_num_seqs)
        self._graphs = self._make_graphs()
        self._graphs.capture(sizes)
        _LOG.info("captured %d decode graphs in %.2f s", len(sizes), time.monotonic() - started_s)

    def _make_graphs(self) -> DecodeGraphs:
        block_size, max_num_seqs = self._config.cache.block_size, self._config.scheduler.max_num_seqs
        width = -(-self._max_model_len // block_size)
        tables = BlockTableMirror(max_num_seqs, width, self._device)
        return DecodeGraphs(self.model, self._sampler, self._inputs, tables, block_size, self._max_model_len)

    def _graph_bytes(self) -> int:
        """Find out what all graphs will take, from the largest and the smallest; both are gone afterwards."""
        if not self._captures:
            return 0
        sizes = graph_sizes(self._config.scheduler.max_num_seqs)
        allocate_kv_cache(self.model, 1, self._config.cache.block_size)
        memory, taken = self._memory, []
        try:
            for trial in ([sizes[-1]], [sizes[-1], sizes[0]]):
                memory.release_unused()
                free_before = memory.settled()[0]
                graphs = self._make_graphs()
                graphs.capture(trial)
                taken.append(free_before - memory.settled()[0])
                del graphs
        finally:
            release_kv_cache(self.model)
        memory.release_unused()
        largest, both = taken
        return largest + (len(sizes) - 1) * max(0, both - largest)

    def _memory_budget(self) -> MemoryBudget:
        cache = self._config.cache
        if self._device.type == "cpu":
            return cpu_budget(cache)
        budget = measure_budget(self._memory, cache.memory_fraction, self.run_largest_step)
        return replace(budget, graphs=self._graph_bytes())

    def _num_blocks_that_fit(self, budget: MemoryBudget) -> int:
        cache = self._config.cache
        return num_blocks_that_fit(
            budget,
            self._block_bytes(),
            cache,
            self._max_model_len,
            is_cpu=self._device.type == "cpu",
        )

    def _block_bytes(self) -> int:
        return kv_block_bytes(self._checkpoint, self._shard, self._config.cache.block_size, self._dtype)

    @torch.inference_mode()
    def run_largest_step(self) -> None:
        """Run the largest step there can be, on one KV block that is gone afterwards; all ranks together."""
        block_size = self._config.cache.block_size
        step = largest_step(self._config.scheduler, self._max_model_len, block_size)
        allocate_kv_cache(self.model, 1, block_size)
        try:
            self._forward(self._inputs.build(step))
        finally:
            release_kv_cache(self.model)

    def execute(self, step: StepInput) -> StepOutput:
        """Run one step and return what it sampled; every rank returns the same."""
        return self.launch(step).wait()

    @torch.inference_mode()
    def launch(self, step: StepInput) -> PendingOutput:
        """Begin one step, after those begun before, and return its output to be; on a CPU it is there."""
        if self._graphs is not None and self._graphs.fits(step):
            return self._outputs.take(step, self._replay(self._graphs, step))
        batch = self._inputs.build(step)
        sampled, prompt = self._forward(batch)
        if sampled is not None:
            self._inputs.keep_sampled(batch.sampled_slots, sampled.token_ids)
        return self._outputs.take(step, sampled, prompt)

    def _replay(self, graphs: DecodeGraphs, step: StepInput) -> Sampled:
        hidden, token_ids = graphs.run(step)
        if token_ids is not None:
            return Sampled(token_ids)
        sampling, slots = self._inputs.sampling_of(step)
        assert sampling is not None, "a decode samples"
        sampled: Sampled = self._sampler(self.model.compute_logits(hidden), sampling)
        self._inputs.keep_sampled(slots, sampled.token_ids)
        return sampled

    def _forward(self, batch: InputBatch) -> tuple[Sampled | None, Sampled | None]:
        """Return what was sampled, and what is to be known of prompt tokens."""
        set_context(batch.context)
        try:
            hidden = self.model(batch.token_ids, batch.positions)
            sampled = None
            if batch.sampling is not None:
                sampled = self._sampler(self.model.compute_logits(hidden), batch.sampling)
        finally:
            reset_context()
        if batch.prompt_rows is None:
            return sampled, None
        scheduler = self._config.scheduler
        most_rows = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        prompt = compute_prompt_logprobs(self.model, self._sampler, hidden, batch.prompt_rows, most_rows)
        return sampled, prompt


def _log_load(report: LoadReport) -> None:
    speed, share = report.read_bytes / report.seconds, report.cached_bytes / max(report.read_bytes, 1)
    _LOG.info(
        "read %.1f MiB of a checkpoint of %.1f MiB in %.2f s (%.2f GB/s, %.0f %% from the page cache)",
        *(report.read_bytes / 2**20, report.file_bytes / 2**20, report.seconds, speed / 1e9, 100 * share),
        extra={"fields": asdict(report)},
    )
