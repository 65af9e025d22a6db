"""A rank announces itself, runs its steps in order, answers if it is rank 0, and ends when told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import TinyModel, reference_tokens, save_tiny
from tests.support.local_engine import make_config
from tprt.checkpoint_config import read_checkpoint_config
from tprt.distributed import TPGroup
from tprt.distributed.local import make_local_groups
from tprt.errors import PeerLostError, SequenceGapError
from tprt.messages import Message, Shutdown, StepInput, StepOutput, WorkerReady
from tprt.transport.channel import WorkerHub
from tprt.transport.codec import decode, encode
from tprt.transport.heartbeat import AFTER_LAYERS, HeartbeatWriter, Phase
from tprt.transport.inproc import make_inproc_group
from tprt.worker.main import Worker

EPOCH = 3
PROMPT = [5, 6, 7]


class Rank(threading.Thread):
    """One rank in a thread; keeps what ended it."""

    def __init__(self, worker: Worker, folder: Path, group: TPGroup) -> None:
        super().__init__(daemon=True)
        self.worker, self._folder, self._group = worker, folder, group
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.worker.prepare(read_checkpoint_config(str(self._folder)), self._group, torch.device("cpu"))
            self.worker.run()
        except (SequenceGapError, PeerLostError, TypeError) as error:
            self.error = error

    def end(self) -> Exception | None:
        self.join(10)
        assert not self.is_alive()
        return self.error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, TinyModel(heads=9, kv_heads=3))
    return folder


@contextmanager
def ranks(folder: Path, world_size: int) -> Iterator[tuple[WorkerHub, list[Rank]]]:
    hub, links = make_inproc_group(world_size)
    config = make_config(folder, world_size)
    started = [
        Rank(Worker(config, link, EPOCH), folder, group)
        for link, group in zip(links, make_local_groups(world_size), strict=True)
    ]
    for rank in started:
        rank.start()
    yield hub, started
    hub.close()
    for rank in started:
        rank.join(10)
    for link in links:
        link.close()


def send(hub: WorkerHub, message: Message) -> None:
    hub.steps.send(encode(message), 5.0)


def prompt_step(step: int = 0, epoch: int = EPOCH) -> StepInput:
    one = np.ones(1, np.int32)
    return StepInput(
        epoch=epoch,
        step=step,
        num_decodes=0,
        seq_slots=one - 1,
        query_lens=one * 3,
        context_lens=one * 3,
        token_ids=np.array(PROMPT, np.int32),
        block_ids=one,
        samples=np.ones(1, np.uint8),
        temperatures=np.zeros(1, np.float32),
        top_ks=one - 1,
        top_ps=np.ones(1, np.float32),
        min_ps=np.zeros(1, np.float32),
        seeds=np.zeros(1, np.int64),
        num_logprobs=-one,
    )


def test_every_rank_announces_itself_and_rank_0_answers_for_all(folder: Path) -> None:
    with ranks(folder, 2) as (hub, started):
        announced = [hub.receive_control(10.0) for _ in started]
        ready = [decode(event.payload) for event in announced if event and event.payload]
        assert {message.rank for message in ready if isinstance(message, WorkerReady)} == {0, 1}
        send(hub, prompt_step())
        answer = hub.receive_output(10.0)
        assert isinstance(answer, bytes)
        output = decode(answer)
        assert isinstance(output, StepOutput)
        assert (output.epoch, output.step) == (EPOCH, 0)
        model = save_tiny(folder, TinyModel(heads=9, kv_heads=3))
        assert output.token_ids.tolist() == reference_tokens(model, PROMPT, 1)
        send(hub, Shutdown("done"))
        assert [rank.end() for rank in started] == [None, None]
        assert {rank.worker.phase for rank in started} == {Phase.SHUTDOWN}


class PathThroughStep(HeartbeatWriter):
    """A heartbeat that keeps the way of its rank."""

    __slots__ = ("way",)

    def __init__(self) -> None:
        super().__init__(memoryview(bytearray(128)).cast("q"))
        self.way: list[object] = []

    def begin_step(self, step: int, phase: Phase) -> None:
        self.way.append(step)
        super().begin_step(step, phase)

    def set_phase(self, phase: Phase) -> None:
        self.way.append(phase)
        super().set_phase(phase)

    def enter_layer(self, layer: int) -> None:
        self.way.append(("layer", layer))

    def enter_collective(self, number: int, name: str) -> None:
        self.way.append(name)

    def leave_collective(self) -> None:
        self.way.append("out")


def test_the_heartbeat_of_a_rank_shows_its_phases_steps_layers_and_collectives(folder: Path) -> None:
    hub, links = make_inproc_group(2)
    beats = [PathThroughStep() for _ in links]
    config = make_config(folder, 2)
    started = [
        Rank(Worker(config, link, EPOCH, beat), folder, group)
        for link, beat, group in zip(links, beats, make_local_groups(2), strict=True)
    ]
    for rank in started:
        rank.start()
    send(hub, prompt_step())
    send(hub, Shutdown())
    assert [rank.end() for rank in started] == [None, None]
    hub.close()
    for link in links:
        link.close()
    for beat in beats:
        way = beat.way
        assert [phase for phase, _ in groupby(entry for entry in way if isinstance(entry, Phase))] == [
            *(Phase.LOAD, Phase.KV_ALLOCATION, Phase.IDLE, Phase.PREFILL, Phase.IDLE, Phase.SHUTDOWN)
        ]
        in_step = way[way.index(Phase.PREFILL) + 1 : way.index(Phase.SHUTDOWN) - 1]
        assert way[way.index(Phase.PREFILL) - 1] == 0
        reduced = ["all_reduce", "out"]
        assert in_step[: 2 + 5 * 2 + 1] == [
            *reduced,
            *(("layer", 0), *reduced, *reduced),
            *(("layer", 1), *reduced, *reduced),
            ("layer", AFTER_LAYERS),
        ]
        assert in_step[-2:] == ["all_gather", "out"], "the sampler gathers one candidate of each rank"


def test_a_step_of_another_epoch_is_dropped(folder: Path) -> None:
    with ranks(folder, 1) as (hub, (rank,)):
        send(hub, prompt_step(step=7, epoch=EPOCH - 1))
        send(hub, prompt_step())
        send(hub, Shutdown())
        assert rank.end() is None


@pytest.mark.parametrize("steps", [[1], [0, 0], [0, 2]], ids=str)
def test_a_missing_or_repeated_step_ends_the_rank(folder: Path, steps: list[int]) -> None:
    with ranks(folder, 1) as (hub, (rank,)):
        for step in steps:
            send(hub, replace(prompt_step(), step=step))
        error = rank.end()
        assert isinstance(error, SequenceGapError)
        assert f"received step {steps[-1]}; expected step" in str(error)


def test_the_loss_of_the_coordinator_ends_the_rank(folder: Path) -> None:
    with ranks(folder, 1) as (hub, (rank,)):
        hub.receive_control(10.0)
        hub.close()
        assert isinstance(rank.end(), PeerLostError)


def test_a_message_that_is_no_step_is_named(folder: Path) -> None:
    with ranks(folder, 1) as (hub, (rank,)):
        send(hub, WorkerReady(0, 0, 0, 0, 0, 0.0))
        assert "received WorkerReady" in str(rank.end())
