"""Two replicas behind one server: the tokens of one, prefixes that stay together, and ranks that die."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.run_dir import newest_heartbeats, replica_dirs
from launch.status import Verdict, look_at
from tests.support.checkpoints import TinyModel
from tests.support.deployments import TinyDeployment, make_tiny_deployment
from tests.support.serving import Served, save_word_tokenizer, tokens_of
from tprt.transport.heartbeat import HeartbeatReader

NUM_TOKENS = 100
PROMPTS = [[5 + number, 6, 7] for number in range(4)]
SETTINGS = (
    *("parallel.tensor_parallel_size=1", "parallel.data_parallel_size=2"),
    *("supervision.max_restarts=1", "logging.level=warning"),
)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> TinyDeployment:
    folder = tmp_path_factory.mktemp("worded")
    deployment = make_tiny_deployment(folder, TinyModel(vocab_size=200))
    save_word_tokenizer(folder, 200)
    return deployment


def rank_pids(folder: Path) -> list[int]:
    """Return the process of rank 0 of each replica."""
    (run_dir,) = folder.glob("tprt-*")
    pids = []
    for replica in replica_dirs(run_dir, 2):
        path = newest_heartbeats(replica)
        assert path is not None
        reader = HeartbeatReader.open(path)
        pids += [beat.pid for beat in reader.read()]
        reader.close()
    return pids


def by_engine(served: Served, name: str) -> dict[str, float]:
    """Return a metric of each replica."""
    connection = served.connect()
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = re.findall(rf'^{name}{{engine="(\d)",[^}}]*}} (\S+)$', text, re.MULTILINE)
    return {engine: float(value) for engine, value in found}


def run_while(served: Served, expected: list[list[int]], disturb: Callable[[], None]) -> None:
    """Stream all prompts, and `disturb` in the middle: each gets its tokens."""
    streams = [served.stream(prompt, NUM_TOKENS) for prompt in PROMPTS]
    for stream in streams:
        stream.read(2)
    disturb()
    assert [stream.read() for stream in streams] == expected
    for stream in streams:
        assert stream.error is None
        stream.close()


def test_replicas_give_the_tokens_of_one_keep_prefixes_together_and_outlive_ranks(
    worded: TinyDeployment, tmpdir_of_children: Path
) -> None:
    expected = [worded.expected(prompt, NUM_TOKENS) for prompt in PROMPTS]
    with Served(worded.config, *SETTINGS) as served:
        served.wait_until_ready()
        before = rank_pids(tmpdir_of_children)
        run_while(served, expected, lambda: os.kill(before[0], signal.SIGKILL))
        # The other replica's rank is the one that it was.
        served.wait_until(lambda: rank_pids(tmpdir_of_children)[0] != before[0])
        assert rank_pids(tmpdir_of_children)[1] == before[1]
        check_that_prefixes_stay_together(served, worded)

        # The only restart is spent, and the replica is lost.
        run_while(served, expected, lambda: os.kill(rank_pids(tmpdir_of_children)[0], signal.SIGKILL))
        served.wait_for_line("replica 0 has failed and is not replaced; 1 of 2 replicas go on")
        (run_dir,) = tmpdir_of_children.glob("tprt-*")
        served.wait_until(lambda: not replica_dirs(run_dir, 2)[0].exists())
        check_that_one_is_lost(served, run_dir)

        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0


def check_that_prefixes_stay_together(served: Served, worded: TinyDeployment) -> None:
    done = by_engine(served, "vllm:generation_tokens_total")
    assert sum(done.values()) == NUM_TOKENS * len(PROMPTS)
    assert all(value > 0 for value in done.values()), "both replicas had requests"
    before = by_engine(served, "vllm:prompt_tokens_total")
    shared = list(range(10, 90))
    for last in range(4):
        _, _, answer = served.complete([*shared, last], 2)
        assert tokens_of(answer["choices"][0]["text"]) == worded.expected([*shared, last], 2)
    after = by_engine(served, "vllm:prompt_tokens_total")
    assert sorted(after[engine] - before[engine] for engine in after) == [0, 4 * (len(shared) + 1)]


def check_that_one_is_lost(served: Served, run_dir: Path) -> None:
    status = look_at(run_dir)
    assert status is not None
    assert status.verdict is Verdict.DEGRADED
    code, _, health = served.ask("GET", "/health")
    assert (code, [replica["state"] for replica in health["replicas"]]) == (200, ["lost", "serving"])
    # A server that starts anew knows of it.
    assert status.signs.server is not None
    os.kill(status.signs.server.pid, signal.SIGKILL)
    served.wait_for_line("server .* was killed")
    served.wait_until(lambda: served.complete([5, 6, 7], 3)[0] == 200)
