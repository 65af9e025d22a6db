"""`tprt bench throughput`, `latency` and `startup`: the engine as its users see it.

The processes are those of a deployment. Prompts are random token ids, so that nothing is shared and no
tokenizer is needed; with `model.load_format: dummy` no weights are either.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from launch.deployment import Deployment
from launch.llm import LLM, raise_if_refused
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config
from tprt.errors import ConfigError
from tprt.messages import SamplingParams
from tprt.transport.heartbeat import HeartbeatReader, Phase

_LOOK_S = 0.005
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class ThroughputWorkload:
    """`num_seqs` requests at once, prompts and outputs uniform in `min_len` to `max_len` tokens.

    With 256 sequences, 100 to 1024 tokens and seed 0 it is the benchmark of nano-vllm (bench.py there).
    """

    num_seqs: int = 256
    min_len: int = 100
    max_len: int = 1024
    temperature: float = 0.6
    seed: int = 0


def bench_throughput(config: Config, workload: ThroughputWorkload, repeats: int) -> list[Row]:
    """Run `workload` `repeats` times, after a short one to warm up; one row for each.

    Raises:
        ConfigError: sequences of it do not fit, or their shortest length is more than their longest.
        EngineDeadError: the deployment failed.
    """
    draw, shortest, longest = random.Random(workload.seed), workload.min_len, workload.max_len
    if shortest > longest:
        raise ConfigError(f"--min-len {shortest} is more than --max-len {longest}; give it the smaller one")
    vocab_size = read_checkpoint_config(config.model.path).vocab_size
    lengths = [draw.randint(shortest, longest) for _ in range(workload.num_seqs)]
    params = [_sampling(draw.randint(shortest, longest), workload.temperature) for _ in lengths]
    rows: list[Row] = []
    with LLM(config) as llm:
        _check_fits(llm, max(lengths) + max(p.max_tokens for p in params))
        warm_up = [_prompt(draw, length, vocab_size) for length in lengths]
        llm.run(warm_up, [_sampling(8, workload.temperature)] * len(warm_up), on_finished=raise_if_refused)
        for _ in range(repeats):
            # Other tokens each time, of the same lengths: none is in the prefix cache.
            prompts = [_prompt(draw, length, vocab_size) for length in lengths]
            started_s = time.perf_counter()
            completions = llm.run(prompts, params, on_finished=raise_if_refused)
            seconds = time.perf_counter() - started_s
            output = sum(len(completion.token_ids) for completion in completions)
            rows.append(
                {
                    "input_tokens": sum(lengths),
                    "output_tokens": output,
                    "seconds": round(seconds, 3),
                    "output_tokens_per_s": round(output / seconds, 1),
                }
            )
    return rows


def bench_latency(
    config: Config, batch_sizes: Sequence[int], input_len: int, output_len: int, repeats: int
) -> list[Row]:
    """Return time to first token and time per output token of batches that start together: medians.

    The time per output token is what `output_len` tokens take longer than one, over the tokens between: a step.

    Raises:
        EngineDeadError: the deployment failed.
    """
    vocab_size = read_checkpoint_config(config.model.path).vocab_size
    draw = random.Random(0)
    rows: list[Row] = []
    with LLM(config) as llm:
        _check_fits(llm, input_len + output_len)
        for batch_size in batch_sizes:
            first_s, all_s = [], []
            for _ in range(repeats + 1):
                # Other prompts each time: none is in the prefix cache.
                first_s.append(_time_batch(llm, draw, vocab_size, (batch_size, input_len, 1)))
                all_s.append(_time_batch(llm, draw, vocab_size, (batch_size, input_len, output_len)))
            ttft_s, total_s = (sorted(times[1:])[repeats // 2] for times in (first_s, all_s))
            step_s = (total_s - ttft_s) / (output_len - 1)
            rows.append(
                {
                    "batch_size": batch_size,
                    "input_len": input_len,
                    "output_len": output_len,
                    "ttft_ms": round(ttft_s * 1e3, 2),
                    "step_ms": round(step_s * 1e3, 3),
                    "output_tokens_per_s": round(batch_size / step_s, 1),
                }
            )
    return rows


def bench_startup(config: Config, repeats: int) -> list[Row]:
    """Start `repeats` times and return the seconds that each rank spent in each phase, up to the first token.

    Raises:
        ConfigError: it has several replicas.
        EngineDeadError: the deployment failed.
    """
    if config.parallel.data_parallel_size > 1:
        raise ConfigError(
            f"parallel.data_parallel_size is {config.parallel.data_parallel_size}: the start of one replica is"
            " measured; give --set parallel.data_parallel_size=1"
        )
    return [row for number in range(repeats) for row in _one_start(config, number)]


def _one_start(config: Config, number: int) -> list[Row]:
    started_s = time.monotonic()
    with Deployment(config) as deployment:
        deployment.start()
        client = deployment.connect(None)
        try:
            client.hello()
            spans = _PhaseSpans(deployment, started_s)
            while deployment.ready is None:
                deployment.raise_if_failed()
                deployment.look_for_greetings(client, _LOOK_S)
                spans.look()
            ready_s = time.monotonic() - started_s
            _, completion = client.add([1, 2, 3, 4], SamplingParams(temperature=0.0, max_tokens=1))
            while not completion.finished:
                deployment.poll(client)
            first_token_s = time.monotonic() - started_s
            client.shut_down("the measurement is over")
        finally:
            client.close()
    rows: list[Row] = []
    for rank, phases in enumerate(spans.seconds()):
        row: Row = {"start": number, "rank": rank}
        row |= {
            phase.words.replace(" ", "_") + "_s": round(phases.get(phase, 0.0), 3) for phase in _START_PHASES
        }
        rows.append(row | {"ready_s": round(ready_s, 3), "first_token_s": round(first_token_s, 3)})
    return rows


_START_PHASES = (
    Phase.SPAWN,
    Phase.IMPORT,
    Phase.START,
    Phase.GROUP_INIT,
    Phase.LOAD,
    Phase.KV_ALLOCATION,
)


class _PhaseSpans:
    """When each rank was first seen in each phase."""

    def __init__(self, deployment: Deployment, started_s: float) -> None:
        self._deployment = deployment
        self._started_s = started_s
        self._reader: HeartbeatReader | None = None
        world_size = deployment.config.parallel.tensor_parallel_size
        self._seen: list[dict[Phase, float]] = [{Phase.SPAWN: started_s} for _ in range(world_size)]

    def look(self) -> None:
        """Note the phases of this moment."""
        if self._reader is None:
            self._reader = self._deployment.open_heartbeats()
        if self._reader is not None:
            for beat, seen in zip(self._reader.read(), self._seen, strict=True):
                seen.setdefault(beat.phase, time.monotonic())

    def seconds(self) -> list[dict[Phase, float]]:
        """Return how long each rank was in each phase: until it was first seen in a later one."""
        spans = []
        for seen in self._seen:
            order = sorted(seen)
            spans.append({now: seen[later] - seen[now] for now, later in pairwise(order)})
        if self._reader is not None:
            self._reader.close()
        return spans


def _prompt(draw: random.Random, length: int, vocab_size: int) -> list[int]:
    return [draw.randrange(min(vocab_size, 10_000)) for _ in range(length)]


def _sampling(max_tokens: int, temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)


def _time_batch(llm: LLM, draw: random.Random, vocab_size: int, sizes: tuple[int, int, int]) -> float:
    batch_size, input_len, output_len = sizes
    prompts = [_prompt(draw, input_len, vocab_size) for _ in range(batch_size)]
    params = [_sampling(output_len, 0.0)] * batch_size
    started_s = time.perf_counter()
    llm.run(prompts, params, on_finished=raise_if_refused)
    return time.perf_counter() - started_s


def _check_fits(llm: LLM, num_tokens: int) -> None:
    if num_tokens > llm.ready.max_model_len:
        raise ConfigError(
            f"sequences of {num_tokens} tokens do not fit: this deployment takes up to"
            f" {llm.ready.max_model_len}; ask for shorter ones or give the KV cache more memory"
        )
