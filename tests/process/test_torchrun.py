"""Under plain torchrun a deployment has the tokens of transformers, and a rank that dies is one cause."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import reference_tokens
from tests.support.deployments import TinyDeployment, descendants, start, still_there
from tests.support.network_namespaces import two_hosts
from tprt.errors import TransportError
from tprt.transport.heartbeat import HeartbeatReader, RankBeat

CONFIG = "configs/smollm2-135m-tp2-cpu.yaml"
MODEL = ".models/SmolLM2-135M-Instruct"
PROMPT = [504, 8087, 314]
SECRET = {"TPRT_HOSTS_SECRET": "0123456789abcdef"}
NUM_TOKENS = 6
# A whole start on a busy machine, and the end of one.
START_S = 100.0
END_S = 20.0


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmpdir_of_children: Path) -> Iterator[None]:
    """Every test starts and ends without children, run directories and shared memory."""
    yield
    # torchrun keeps its logs where others have what is temporary.
    for left in tmpdir_of_children.glob("torchelastic_*"):
        shutil.rmtree(left)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@contextmanager
def run(command: list[str]) -> Iterator[Popen[str]]:
    """Start torchrun; at the end all that it has started is gone."""
    with start(command, SECRET) as process:
        try:
            yield process
        finally:
            started = descendants(process.pid)
            process.kill()
            assert still_there(started) == []


def torchrun(nproc_per_node: int, *arguments: str, max_restarts: int = 0) -> AbstractContextManager[Popen[str]]:
    """Start torchrun with its own rendezvous."""
    options = ["--standalone", "--nproc-per-node", str(nproc_per_node), "--max-restarts", str(max_restarts)]
    return run([*TORCHRUN, *options, "-m", "launch.worker_entry", *arguments])


def generate(prompt: list[int], num_tokens: int) -> list[str]:
    ids = ",".join(map(str, prompt))
    greedy = ["--temperature", "0", "--ignore-eos", "--json"]
    return ["generate", "--prompt-ids", ids, "--max-tokens", str(num_tokens), *greedy]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_tokens_are_those_of_transformers(world_size: int) -> None:
    with torchrun(world_size, "--config", CONFIG, *generate(PROMPT, NUM_TOKENS)) as process:
        out, said = process.communicate(timeout=START_S)
    assert process.returncode == 0, said
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert json.loads(out)["token_ids"] == reference_tokens(model, PROMPT, NUM_TOKENS)
    assert f"parallel.tensor_parallel_size is {world_size}, as many as there are processes" in said


def test_two_hosts_give_the_tokens_of_one(tiny: TinyDeployment) -> None:
    with two_hosts() as hosts, ExitStack() as stack:
        processes = []
        for node_rank, nproc_per_node in enumerate([1, 2]):
            where = ["--node-rank", str(node_rank), "--master-addr", hosts.addresses[0]]
            options = ["--nnodes", "2", "--nproc-per-node", str(nproc_per_node), *where]
            settings = ["--config", tiny.config, "--set", "hosts.nproc_per_node=[1, 2]"]
            command = [*TORCHRUN, *options, "-m", "launch.worker_entry", *settings, *generate([5, 6, 7], 20)]
            processes.append(stack.enter_context(run(hosts.on(node_rank, command))))
        (out, said), (_, others) = [process.communicate(timeout=START_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said + others
    assert json.loads(out)["token_ids"] == tiny.expected([5, 6, 7], 20)
    assert "has joined with ranks 1, 2; ranks use interface link1" in others


def ranks_in(epoch: int, folder: Path, process: Popen[str]) -> list[RankBeat]:
    """Return what the ranks of an epoch note of themselves once each is in a step."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        for path in folder.glob(f"tprt-*/heartbeats-{epoch}"):
            with contextlib.suppress(TransportError):
                reader = HeartbeatReader.open(path)
                beats = reader.read()
                reader.close()
                if all(beat.step > 0 for beat in beats):
                    return beats
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no step has begun: {process.communicate()}")


def kill(beat: RankBeat) -> str:
    """Kill a rank; return how what is said of it begins."""
    os.kill(beat.pid, signal.SIGKILL)
    return f"tprt: rank {beat.rank} (pid {beat.pid}) "


def test_a_rank_that_dies_is_one_cause_and_torchrun_starts_all_of_it_again_or_ends(
    tiny: TinyDeployment, tmpdir_of_children: Path
) -> None:
    with torchrun(2, "--config", tiny.config, *generate([5, 6, 7], 60000), max_restarts=1) as process:
        adopted = kill(ranks_in(0, tmpdir_of_children, process)[1])
        child = kill(ranks_in(1, tmpdir_of_children, process)[0])
        _, said = process.communicate(timeout=END_S)
    assert process.returncode == 1, said
    causes = [line for line in said.splitlines() if line.startswith("tprt: rank ")]
    assert len(causes) == 2, said
    assert causes[0].startswith(f"{adopted}has ended without a report in phase "), said
    assert causes[1].startswith(f"{child}was killed by SIGKILL in phase "), said
    assert "rank      : 0 (local_rank: 0)" in said.partition("Root Cause (first observed failure):")[2]
