"""`tprt bench step`: what a decode step costs besides the model.

The coordinator's own code (scheduler, worker group, codec, ring) runs in this process, and the workers' (ring,
codec, input preparation) in one process for each rank, against a model that does nothing. Requests are filled
in by the same code, as prompts that share no prefix. Knows nothing of how the results are shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.bench.bench_dir import bench_dir
from launch.bench.step_worker import EPOCH, BenchRank, socket_path, times_path
from launch.parent_death import PARENT_PID
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config, SupervisionConfig
from tprt.coordinator.client_output import RequestKey, split_by_client
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.coordinator.worker_group import WorkerGroup
from tprt.errors import ConfigError, EngineDeadError, TransportTimeoutError
from tprt.messages import AddRequest, Int64Array, SamplingParams, StepInput
from tprt.transport.channel import Buffer, Writer
from tprt.transport.codec import encode
from tprt.transport.hub import ShmWorkerHub

StepBenchRow = dict[str, str | int | float]

DEFAULT_VOCAB_SIZE = 32_000
_SUPERVISION = SupervisionConfig(startup_timeout_s=60.0, step_timeout_s=20.0, shutdown_grace_s=5.0)
_LOOK_S = 0.2
_NUM_WARMUP_STEPS = 32
# Prompts are filled in by few steps, so that the first of them are hardly longer than the last.
_MIN_BATCHED_TOKENS = 32_768
_CLIENT = b"bench"


@dataclass(frozen=True, slots=True)
class StepWorkload:
    """What is measured: `steps` decode steps of `num_seqs` sequences of about `context_len` tokens.

    Raises:
        ConfigError: a number makes no sense.
    """

    num_seqs: int
    context_len: int
    steps: int
    temperature: float

    def __post_init__(self) -> None:
        if min(self.num_seqs, self.context_len, self.steps) < 1:
            raise ConfigError(
                f"a step bench of {self.num_seqs} sequences, {self.context_len} tokens and {self.steps} steps;"
                " expected 1 or more of each"
            )


class _TimedWriter:
    """The lane to the ranks; remembers when it last began to send."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.sent_ns = 0

    def send(self, parts: Sequence[Buffer], timeout_s: float) -> None:
        self.sent_ns = time.monotonic_ns()
        self._writer.send(parts, timeout_s)

    def close(self) -> None:
        self._writer.close()


class _TimedHub(ShmWorkerHub):
    """The hub as it is, but for the times of its sends."""

    _timed: _TimedWriter | None = None

    @property
    def steps(self) -> Writer:
        """The lane to every rank."""
        return self.timed_steps

    @property
    def timed_steps(self) -> _TimedWriter:
        """The same lane, which tells when it last began to send."""
        if self._timed is None:
            self._timed = _TimedWriter(super().steps)
        return self._timed


def bench_step(config: Config, workload: StepWorkload) -> list[StepBenchRow]:
    """Measure `workload` on the ranks, KV blocks and scheduler of `config`, whose limits are raised to fit.

    Returns:
        A row for each stage, with `p50_us`, `mean_us` and `p99_us`; `broadcast`, `decode` and `prepare` are
        those of the rank that was ready last. Then `total`, their sum in each step, and beside it `answer`
        (making tokens up and rank 0's way back), `news` (the message to the client, encoded and not sent) and
        `step`, the whole turn.

    Raises:
        EngineDeadError: a rank ended or is late.
    """
    limits = _limits(config, workload)
    world_size = config.parallel.tensor_parallel_size
    with bench_dir() as folder:
        hub = _TimedHub.listen(socket_path(folder), epoch=EPOCH, world_size=world_size)
        assert isinstance(hub, _TimedHub)
        with closing(hub), _ranks(_places(config, limits, folder)) as ranks:
            _wait_for_ranks(hub, ranks)
            group = WorkerGroup(hub, world_size, EPOCH, _SUPERVISION)
            group.wait_until_ready()
            ours = _drive(_scheduler(config, workload, limits), group, hub.timed_steps, workload)
            group.shut_down("the bench is over")
            _wait_for_ends(ranks)
        theirs = np.stack([np.load(times_path(folder, rank)) for rank in range(world_size)])
    return _rows(workload, _stage_times(ours, theirs[:, -workload.steps :]), world_size)


def _limits(config: Config, workload: StepWorkload) -> SchedulerLimits:
    """Return the deployment's limits, raised where the workload does not fit."""
    scheduler, block_size = config.scheduler, config.cache.block_size
    longest = workload.context_len + workload.steps + 2 * _NUM_WARMUP_STEPS + block_size
    num_seqs = max(scheduler.max_num_seqs, workload.num_seqs)
    # The longest prompt list must be let in while others grow: a step of room for each that runs.
    longest += -(-workload.num_seqs * workload.context_len // _MIN_BATCHED_TOKENS)
    return SchedulerLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(scheduler.max_num_batched_tokens, _MIN_BATCHED_TOKENS, num_seqs),
        max_model_len=max(config.model.max_model_len or 0, longest),
        block_size=block_size,
        num_blocks=workload.num_seqs * (-(-longest // block_size) + 1),
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


def _scheduler(config: Config, workload: StepWorkload, limits: SchedulerLimits) -> Scheduler:
    """Return a scheduler whose queue holds the workload."""
    vocab_size: int = DEFAULT_VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = ()
    if (Path(config.model.path) / "config.json").is_file():
        checkpoint = read_checkpoint_config(config.model.path)
        vocab_size, eos_token_ids = checkpoint.vocab_size, checkpoint.eos_token_ids
    scheduler = Scheduler(limits, eos_token_ids, vocab_size, EPOCH)
    sampling = SamplingParams(temperature=workload.temperature, max_tokens=2**31 - 1, ignore_eos=True)
    random = np.random.default_rng(0)
    for index in range(workload.num_seqs):
        # Lengths differ, so that every step finds about as many sequences that need a block.
        length = max(1, workload.context_len - index % limits.block_size)
        prompt = random.integers(0, vocab_size, length, dtype=np.int32)
        scheduler.add(RequestKey(_CLIENT, index), AddRequest(index, prompt, sampling))
    return scheduler


def _places(config: Config, limits: SchedulerLimits, folder: str) -> list[BenchRank]:
    world_size = config.parallel.tensor_parallel_size
    return [
        BenchRank(
            folder=folder,
            rank=rank,
            world_size=world_size,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            num_threads=config.runtime.num_threads,
        )
        for rank in range(world_size)
    ]


@contextmanager
def _ranks(places: Sequence[BenchRank]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the ranks, and leave none of them behind."""
    ranks: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, PARENT_PID: str(os.getpid())}
    try:
        for place in places:
            command = [sys.executable, "-m", "launch.bench.step_worker", place.to_json()]
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()


def _wait_for_ranks(hub: ShmWorkerHub, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline_s = time.monotonic() + _SUPERVISION.startup_timeout_s
    while True:
        try:
            hub.accept_all(_LOOK_S)
            return
        except TransportTimeoutError as error:
            ended = [f"rank {rank} ended with {p.returncode}" for rank, p in enumerate(ranks) if p.poll()]
            if ended or time.monotonic() > deadline_s:
                raise EngineDeadError(f"the step bench has not started: {', '.join(ended) or error}") from error


def _wait_for_ends(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(ranks):
        try:
            exit_code = process.wait(_SUPERVISION.step_timeout_s)
        except subprocess.TimeoutExpired as error:
            raise EngineDeadError(f"rank {rank} of the step bench does not end: {error}") from error
        if exit_code:
            raise EngineDeadError(f"rank {rank} of the step bench ended with {exit_code}; its error is above")


def _drive(
    scheduler: Scheduler, group: WorkerGroup, writer: _TimedWriter, workload: StepWorkload
) -> Int64Array:
    """Fill the sequences in, warm up and measure.

    Returns:
        `[steps, 6]` ns when each step began, was scheduled, sent, answered and taken in, and when it ended.
    """
    times: list[tuple[int, ...]] = []
    num_decode_steps = 0
    while num_decode_steps < _NUM_WARMUP_STEPS + workload.steps:
        began_ns = time.monotonic_ns()
        step = scheduler.schedule()
        scheduled_ns = time.monotonic_ns()
        assert step is not None, "the requests of the bench never end"
        group.send_step(step)
        output = group.receive_answer(step)
        answered_ns = time.monotonic_ns()
        result = scheduler.update(output)
        updated_ns = time.monotonic_ns()
        for _, news in split_by_client(result):
            encode(news)
        ended_ns = time.monotonic_ns()
        times.append((began_ns, scheduled_ns, writer.sent_ns, answered_ns, updated_ns, ended_ns))
        num_decode_steps = num_decode_steps + 1 if _is_steady(step, workload) else 0
    return np.array(times[-workload.steps :], np.int64)


def _is_steady(step: StepInput, workload: StepWorkload) -> bool:
    return step.num_decodes == len(step.query_lens) == workload.num_seqs


def _stage_times(ours: Int64Array, theirs: Int64Array) -> dict[str, Int64Array]:
    """Return the ns `[steps]` of each stage, from `ours` `[steps, 6]` and `theirs` `[ranks, steps, 3]`."""
    began, scheduled, sent, answered, updated, ended = ours.T
    last = theirs[:, :, 2].argmax(axis=0)
    received, decoded, prepared = theirs[last, np.arange(len(last))].T
    stages: dict[str, Int64Array] = {
        "schedule": scheduled - began,
        "encode": sent - scheduled,
        "broadcast": received - sent,
        "decode": decoded - received,
        "prepare": prepared - decoded,
        "update": updated - answered,
    }
    total: Int64Array = np.sum(list(stages.values()), axis=0)
    answer, news = answered - theirs[0, :, 2], ended - updated
    return {**stages, "total": total, "answer": answer, "news": news, "step": ended - began}


def _rows(workload: StepWorkload, times: dict[str, Int64Array], world_size: int) -> list[StepBenchRow]:
    return [
        {
            "ranks": world_size,
            "num_seqs": workload.num_seqs,
            "context_len": workload.context_len,
            "stage": stage,
            "p50_us": round(float(np.median(taken)) / 1e3, 1),
            "mean_us": round(float(taken.mean()) / 1e3, 1),
            "p99_us": round(float(np.percentile(taken, 99)) / 1e3, 1),
        }
        for stage, taken in times.items()
    ]
