"""A whole engine in one process: the real scheduler and the real ranks, each rank a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tprt.checkpoint_config import read_checkpoint_config, resolve_max_model_len
from tprt.config import CacheConfig, Config, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from tprt.coordinator.grammar import GrammarCompiler
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.result import StepResult
from tprt.coordinator.scheduler import Scheduler
from tprt.distributed.local import make_local_groups
from tprt.messages import AddRequest, PromptLogprobs, SamplingParams, ScoredStepOutput, StepInput, StepOutput
from tprt.worker.model_runner import ModelRunner
from tprt.worker.output_transfer import PendingOutput


def make_config(
    folder: Path | str,
    world_size: int = 1,
    num_blocks: int | None = 64,
    block_size: int = 4,
    max_num_batched_tokens: int = 64,
    enable_prefix_caching: bool = True,
    device: Literal["cpu", "cuda"] = "cpu",
    memory_fraction: float = 0.9,
    enforce_eager: bool = False,
    async_scheduling: bool = True,
) -> Config:
    """Return the settings of a small float32 deployment."""
    return Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        parallel=ParallelConfig(tensor_parallel_size=world_size),
        cache=CacheConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=enable_prefix_caching,
            memory_fraction=memory_fraction,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=max_num_batched_tokens,
            async_scheduling=async_scheduling,
        ),
        runtime=RuntimeConfig(device=device, num_threads=1, enforce_eager=enforce_eager),
    )


@dataclass(frozen=True, slots=True)
class _Launched:
    step: StepInput
    outputs: list[PendingOutput]
    logits: Tensor | None

    def wait(self) -> StepOutput:
        """Return the output, which all ranks agree on."""
        outputs = [output.wait() for output in self.outputs]
        for output in outputs[1:]:
            assert output.token_ids.tolist() == outputs[0].token_ids.tolist(), "ranks chose different tokens"
            if isinstance(output, ScoredStepOutput):
                assert output.prompt_logprobs.tolist() == outputs[0].prompt_logprobs.tolist(), "ranks differ"
        return outputs[0]


class LocalEngine:
    """Runs requests to their end, and keeps the logits that each token was chosen from."""

    def __init__(self, config: Config) -> None:
        checkpoint = read_checkpoint_config(config.model.path)
        world_size = config.parallel.tensor_parallel_size
        device = torch.device(config.runtime.device)
        self.runners = [
            ModelRunner(config, checkpoint, group, device) for group in make_local_groups(world_size)
        ]
        self._shards: list[list[Tensor]] = [[] for _ in self.runners]
        for rank, runner in enumerate(self.runners):
            runner.load()
            runner.model.lm_head.register_forward_hook(self._keep_logits(rank))
        self._pool = ThreadPoolExecutor(world_size)
        allocated = list(self._pool.map(ModelRunner.allocate_kv_blocks, self.runners))
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=config.scheduler.max_num_seqs,
                max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
                max_model_len=resolve_max_model_len(checkpoint, config.model.max_model_len),
                block_size=config.cache.block_size,
                num_blocks=allocated[0][0],
                enable_prefix_caching=config.cache.enable_prefix_caching,
                schedules_ahead=config.scheduler.async_scheduling,
            ),
            checkpoint.eos_token_ids,
            checkpoint.vocab_size,
            grammars=GrammarCompiler(
                lambda: (Path(config.model.path) / "tokenizer.json").read_text(),
                checkpoint.eos_token_ids,
                checkpoint.vocab_size,
            ),
        )
        self.steps: list[StepInput] = []
        self.logits: dict[int, list[Tensor]] = {}
        self.num_cached_tokens: dict[int, int] = {}
        self.prompt_logprobs: dict[int, list[PromptLogprobs]] = {}
        self.num_ahead = 0
        self._in_flight: deque[_Launched] = deque()
        self._key_of_slot: dict[int, int] = {}

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        checks_blocks: bool = True,
    ) -> list[list[int]]:
        """Return the tokens of each prompt; `logits[i]` then has the model's rows at those places.

        `prompt_logprobs[i]` has what steps have found of the prompt. Afterwards every KV block is looked at,
        which takes seconds where there are millions.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        tokens: dict[int, list[int]] = {key: [] for key in range(len(prompts))}
        self.logits = {key: [] for key in tokens}
        self.prompt_logprobs = {key: [] for key in tokens}
        for key, (prompt, wanted) in enumerate(zip(prompts, samplings, strict=True)):
            self.scheduler.add(key, AddRequest(key, np.array(prompt, np.int32), wanted))
        while (launched := self._next_step()) is not None:
            result = self.scheduler.update(launched.wait())
            for key, news in result.prompt_logprobs:
                self.prompt_logprobs[key].append(news)
            rows = self._rows_of(launched.step, result)
            for number, (row, key) in enumerate(zip(rows, result.keys.tolist(), strict=True)):
                tokens[key].append(int(result.token_ids[number]))
                if launched.logits is not None:
                    self.logits[key].append(launched.logits[row])
                self.num_cached_tokens[key] = int(result.num_cached_tokens[number])
        assert not self.scheduler.has_unfinished
        if checks_blocks:
            self.scheduler.check()
        return list(tokens.values())

    def _next_step(self) -> _Launched | None:
        """Return the oldest step that is not done, after the one behind it has begun if it can."""
        if not self._in_flight and (step := self.scheduler.schedule()) is not None:
            self._in_flight.append(self._launch(step))
        if self._in_flight and (ahead := self.scheduler.schedule_ahead()) is not None:
            self._in_flight.append(self._launch(ahead))
            self.num_ahead += 1
        return self._in_flight.popleft() if self._in_flight else None

    def _launch(self, step: StepInput) -> _Launched:
        """Begin one step; a captured one shows no logits."""
        assert not self.scheduler.failed_in(step), "an output has left its grammar"
        self.steps.append(step)
        for shard in self._shards:
            shard.clear()
        outputs = list(self._pool.map(lambda runner: runner.launch(step), self.runners))
        logits = torch.cat([shard[0] for shard in self._shards], dim=-1) if all(self._shards) else None
        return _Launched(step, outputs, logits)

    def _rows_of(self, step: StepInput, result: StepResult) -> list[int]:
        """Return which rows of what was sampled are in `result`: not those of what had ended before."""
        slots, keys = step.seq_slots[step.samples == 1].tolist(), result.keys.tolist()
        if len(slots) == len(keys):
            self._key_of_slot.update(zip(slots, keys, strict=True))
        return [row for row, slot in enumerate(slots) if self._key_of_slot[slot] in keys]

    def _keep_logits(self, rank: int) -> Callable[..., None]:
        return lambda module, inputs, output: self._shards[rank].append(output.clone())

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
