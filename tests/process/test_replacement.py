"""Ranks that die are replaced, and every request goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launch import LLM, SamplingParams
from launch.run_dir import newest_heartbeats
from tests.support.checkpoints import TinyModel
from tests.support.deployments import TinyDeployment, make_tiny_deployment, still_there
from tprt.errors import EngineDeadError
from tprt.server.completion import Completion
from tprt.transport.heartbeat import HeartbeatReader, Phase, RankBeat

WAIT_S = 60.0
NUM_TOKENS = 150
PROMPTS = [[5 + number, 6, 7] for number in range(5)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
PARAMS = [GREEDY, SEEDED, GREEDY, SEEDED, GREEDY]
RANKS = ["rank 0", "rank 1"]
# Where nothing depends on a second rank.
ONE_RANK = "parallel.tensor_parallel_size=1"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


class Watched:
    """A deployment, what its ranks are at, and what its requests have come to."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        self.llm = llm
        self._folder = folder

    def beats(self) -> list[RankBeat]:
        (run_dir,) = self._folder.glob("tprt-*")
        path = newest_heartbeats(run_dir)
        if path is None:
            return []
        reader = HeartbeatReader.open(path)
        try:
            return reader.read()
        finally:
            reader.close()

    def kill(self, victim: str, number: signal.Signals = signal.SIGKILL) -> dict[str, int]:
        """Kill a rank and return the processes that there were."""
        pids = self.llm.pids
        os.kill(pids[victim], number)
        return pids

    def wait_for_step(self, step: int) -> None:
        """Wait for so many steps after now, in this epoch or one that begins meanwhile."""
        begun = {beats[0].epoch: beats[0].step} if (beats := self.beats()) else {}

        def is_there() -> bool:
            beats = self.beats()
            return bool(beats) and beats[0].step >= begun.get(beats[0].epoch, -1) + step

        wait_until(is_there)

    def wait_for_new_processes(self, before: dict[str, int]) -> None:
        ranks = {pid for name, pid in before.items() if name.startswith("rank ")}
        wait_until(lambda: not set(self.llm.pids.values()) & ranks)

    def run(
        self,
        disturb: Callable[[], None] = lambda: None,
        prompts: Sequence[list[int]] = PROMPTS,
        params: Sequence[SamplingParams] = PARAMS,
    ) -> list[Completion]:
        """Generate while a thread runs `disturb`."""
        failures: list[BaseException] = []

        def run_disturb() -> None:
            try:
                disturb()
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=run_disturb)
        thread.start()
        try:
            return self.llm.run(list(prompts), list(params))
        finally:
            thread.join()
            assert not failures


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def watched(tiny: TinyDeployment) -> Iterator[Watched]:
    """A deployment that is disturbed by one test after another, and never gives up."""
    settings = ["supervision.max_restarts=1000", "supervision.stall_timeout_s=2"]
    # A long prompt takes many steps.
    settings += ["scheduler.max_num_batched_tokens=64", "scheduler.max_num_seqs=8"]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        with LLM(tiny.config, settings) as llm:
            patch.undo()
            yield Watched(llm, Path(folder))
        assert list(Path(folder).iterdir()) == []


@pytest.fixture(scope="module")
def expected(tiny: TinyDeployment, watched: Watched) -> list[list[int]]:
    """What comes when nobody disturbs."""
    found = tokens(watched.run())
    assert found[0] == tiny.expected(PROMPTS[0], NUM_TOKENS)
    assert found[1] != tiny.expected(PROMPTS[1], NUM_TOKENS), "the seeded ones are not greedy"
    return found


class TestOneDeployment:
    """What is killed, and when, makes no difference to what comes out."""

    def test_in_a_decode(self, watched: Watched, expected: list[list[int]]) -> None:
        before = watched.llm.pids

        def disturb() -> None:
            watched.wait_for_step(NUM_TOKENS // 3)
            watched.kill("rank 1")

        assert tokens(watched.run(disturb)) == expected
        after = watched.llm.pids
        assert after["coordinator"] == before["coordinator"]
        assert not {after[rank] for rank in RANKS} & {before[rank] for rank in RANKS}
        assert still_there([before[rank] for rank in RANKS]) == []

    def test_in_a_long_prefill(self, tiny: TinyDeployment, watched: Watched) -> None:
        prompt = [number % 190 + 3 for number in range(6000)]
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)

        def disturb() -> None:
            watched.wait_for_step(4)
            assert watched.beats()[0].phase != Phase.DECODE
            watched.kill("rank 0")

        assert tokens(watched.run(disturb, [prompt], [params])) == [tiny.expected(prompt, 5)]

    def test_while_nothing_runs(self, watched: Watched, expected: list[list[int]]) -> None:
        watched.wait_for_new_processes(watched.kill("rank 1"))
        assert tokens(watched.run()) == expected

    def test_while_ranks_take_the_place_of_others(self, watched: Watched, expected: list[list[int]]) -> None:
        def disturb() -> None:
            watched.wait_for_step(10)
            killed = watched.kill("rank 0")
            for phase in (Phase.SPAWN, Phase.LOAD):
                watched.wait_for_new_processes(killed)
                wait_until(lambda: bool(beats := watched.beats()) and beats[1].phase >= phase)  # noqa: B023
                killed = watched.kill("rank 1")

        assert tokens(watched.run(disturb)) == expected

    def test_a_rank_that_is_stopped_is_noticed_and_replaced(
        self, watched: Watched, expected: list[list[int]]
    ) -> None:
        def disturb() -> None:
            watched.wait_for_step(10)
            watched.kill("rank 1", signal.SIGSTOP)

        assert tokens(watched.run(disturb)) == expected


def test_a_rank_that_is_stopped_while_it_loads_ends_the_start_and_is_named(
    tiny: TinyDeployment, tmpdir_of_children: Path
) -> None:
    def stop() -> None:
        wait_until(lambda: any(tmpdir_of_children.glob("tprt-*/heartbeats-0")))
        (path,) = tmpdir_of_children.glob("tprt-*/heartbeats-0")
        reader = HeartbeatReader.open(path)
        wait_until(lambda: reader.read()[1].phase >= Phase.IMPORT)
        os.kill(reader.read()[1].pid, signal.SIGSTOP)
        reader.close()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(EngineDeadError, match=r"(?s)rank 1 .* is stopped .*supervision.stall_timeout_s"):
        LLM(tiny.config, ["supervision.stall_timeout_s=2"])
    thread.join()


def test_a_stopped_rank_that_is_not_replaced_is_named_with_what_the_others_wait_in(
    tiny: TinyDeployment, tmpdir_of_children: Path
) -> None:
    settings = ["supervision.stall_timeout_s=2", "supervision.max_restarts=0"]
    with LLM(tiny.config, settings) as llm:
        watched = Watched(llm, tmpdir_of_children)

        def disturb() -> None:
            watched.wait_for_step(10)
            watched.kill("rank 1", signal.SIGSTOP)

        with pytest.raises(
            EngineDeadError, match=r"rank 0 waits in .*; rank 1 .* is stopped .*stall_timeout_s"
        ):
            watched.run(disturb)


def test_when_there_have_been_too_many_restarts_the_last_cause_ends_all(
    tiny: TinyDeployment, tmpdir_of_children: Path
) -> None:
    with LLM(tiny.config, [ONE_RANK, "supervision.max_restarts=1"]) as llm:
        watched = Watched(llm, tmpdir_of_children)
        watched.wait_for_new_processes(watched.kill("rank 0"))
        assert len(tokens(watched.run())) == len(PROMPTS)
        pids = watched.kill("rank 0")
        with pytest.raises(EngineDeadError) as caught:
            watched.run()
    assert f"rank 0 (pid {pids['rank 0']}) was killed by SIGKILL" in str(caught.value).splitlines()[-1]
    assert (
        "not started again: that has been done 1 times, and 1 times in 600 s are allowed"
        in str(caught.value).splitlines()[-1]
    )
    assert still_there(list(pids.values())) == []


def test_a_crash_is_reported_with_the_python_stack_of_that_moment(
    tiny: TinyDeployment, tmpdir_of_children: Path
) -> None:
    with LLM(tiny.config, ["supervision.max_restarts=0"]) as llm:
        watched = Watched(llm, tmpdir_of_children)
        watched.kill("rank 1", signal.SIGSEGV)
        with pytest.raises(EngineDeadError) as caught:
            watched.run()
    assert "Fatal Python error: Segmentation fault" in str(caught.value)
    assert "tprt/worker/main.py" in str(caught.value)
    assert "was killed by SIGSEGV in phase idle" in str(caught.value).splitlines()[-1]


def test_what_only_the_user_can_put_right_is_not_tried_again(tmp_path: Path, tmpdir_of_children: Path) -> None:
    tiny = make_tiny_deployment(tmp_path, TinyModel(heads=9, kv_heads=3))
    with LLM(tiny.config, [ONE_RANK]) as llm:
        watched = Watched(llm, tmpdir_of_children)
        (tmp_path / "model.safetensors").unlink()
        watched.kill("rank 0")
        with pytest.raises(EngineDeadError, match="safetensors") as caught:
            watched.run()
    assert "max_restarts" not in str(caught.value)


def test_a_request_that_kills_ranks_fails_alone_and_all_others_get_their_tokens(
    tmp_path: Path, tmpdir_of_children: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = make_tiny_deployment(tmp_path, TinyModel(heads=4, intermediate_size=16384), 8192)
    with LLM(wide.config, [ONE_RANK]) as llm:
        status = Path(f"/proc/{llm.pids['rank 0']}/status").read_text()
    size_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    # Enough for Python and short prompts, too little for 4000 tokens by 16384 channels in float32.
    interpreter = tmp_path / "python"
    limit = f'if [ -n "$RANK" ]; then ulimit -v {size_kib + 128 * 1024}; fi'
    interpreter.write_text(f'#!/bin/sh\n{limit}\nexec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    prompts = [[5, 6, 7], [8] * 4000, [9, 10, 11]]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(wide.config, [ONE_RANK, "supervision.max_restarts=2"]) as llm:
        first, killer, second = Watched(llm, tmpdir_of_children).run(prompts=prompts, params=[params] * 3)
        assert killer.error is not None
        assert "ranks died 3 times in a step that contained this request" in killer.error
        assert "can't allocate memory" in killer.error
        assert killer.token_ids == []
        assert tokens([first, second]) == [wide.expected(prompt, 12) for prompt in (prompts[0], prompts[2])]
        # What it has cost is given back.
        watched = Watched(llm, tmpdir_of_children)
        watched.wait_for_new_processes(watched.kill("rank 0"))
        assert tokens(watched.run(prompts=prompts[:1], params=[params])) == [wide.expected([5, 6, 7], 12)]
