"""Many streams on three ranks, and one random worker killed after the other: only the clock may tell.

Tokens are counted as they come from the coordinator, so that one which is sent twice is seen even where the
client would not show it. Knows nothing of the chaos matrix.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.config_file import load_config
from launch.deployment import Deployment
from launch.run_dir import living_run_dirs, request_address
from tprt.messages import RequestOutput, SamplingParams
from tprt.server.completion import Completion
from tprt.server.replica_router import ReplicaRouter
from tprt.server.routed_client import RoutedClient
from tprt.transport.channel import Buffer
from tprt.transport.codec import decode
from tprt.transport.zmq_socket import RequestClient

WORLD_SIZE = 3
NUM_STREAMS = 16
# Some kills come this soon after the one before, while ranks start; all others in the middle of the work.
_SHARE_OF_EARLY = 0.25
_EARLY_S = (0.5, 3.0)
_LATER_S = 0.02
_DEADLINE_S = 600.0
_SETTINGS = (
    f"parallel.tensor_parallel_size={WORLD_SIZE}",
    "logging.level=warning",
    "supervision.stall_timeout_s=10",
)


@dataclass(slots=True)
class StreamsReport:
    """What came of it.

    Attributes:
        kills: what was killed, and after how many tokens of all streams.
        num_equal: streams whose tokens are those of the undisturbed run.
        num_tokens: tokens that came in the end.
        num_sent: tokens that the coordinator has sent; more than `num_tokens` if one was sent twice.
        pauses_s: from a kill until tokens come from new ranks, kills while those start included.
        seconds: how long all of it took.
    """

    kills: list[str] = field(default_factory=list)
    num_equal: int = 0
    num_tokens: int = 0
    num_sent: int = 0
    num_expected: int = 0
    pauses_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether every stream got its tokens, each of them once."""
        is_complete = self.num_equal == NUM_STREAMS and not self.errors
        return is_complete and self.num_sent == self.num_tokens == self.num_expected

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "streams": NUM_STREAMS,
            "world_size": WORLD_SIZE,
            "kills": self.kills,
            "streams_equal": self.num_equal,
            "tokens_expected": self.num_expected,
            "tokens_received": self.num_tokens,
            "tokens_sent": self.num_sent,
            "pauses_s": [round(pause_s, 1) for pause_s in self.pauses_s],
            "seconds": round(self.seconds, 1),
            "errors": self.errors,
            "verdict": "good" if self.is_good else "bad",
        }


class CountingLane:
    """A client's lane that counts the tokens of each request as they come."""

    def __init__(self, lane: RequestClient) -> None:
        self._lane = lane
        self.tokens: Counter[int] = Counter()

    @property
    def loss(self) -> str | None:
        """Why nothing will come any more."""
        return self._lane.loss

    def filenos(self) -> tuple[int, ...]:
        """Pass on."""
        return self._lane.filenos()

    def send(self, parts: Sequence[Buffer]) -> None:
        """Pass on."""
        self._lane.send(parts)

    def receive(self, timeout_s: float) -> bytes | None:
        """Pass on, and count."""
        payload = self._lane.receive(timeout_s)
        if payload is not None and isinstance(message := decode(payload), RequestOutput):
            rows = zip(message.request_ids.tolist(), message.token_ids.tolist(), strict=True)
            self.tokens.update(request_id for request_id, token_id in rows if token_id >= 0)
        return payload

    def close(self, flush: bool = True) -> None:
        """Pass on."""
        self._lane.close(flush)


class Streams:
    """All streams of one run."""

    def __init__(self, config: str, num_tokens: int, max_restarts: int) -> None:
        settings = [*_SETTINGS, f"supervision.max_restarts={max_restarts}"]
        self._config = load_config(config, settings)
        self._sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self.completions: list[Completion] = []
        self.num_sent = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that have come so far."""
        return sum(len(completion.token_ids) for completion in self.completions)

    def run(self, disturb: Callable[[Deployment, int], None]) -> None:
        """Run all streams to their end; `disturb` is called now and then with the number of tokens so far."""
        before = set(living_run_dirs())
        deadline_s = time.monotonic() + _DEADLINE_S
        with Deployment(self._config) as deployment:
            deployment.start()
            (run_dir,) = (path for path in set(living_run_dirs()) - before)
            lane = CountingLane(RequestClient.connect(request_address(run_dir)))
            client = RoutedClient([lane], None, ReplicaRouter(1, 1, caches_prefixes=False))
            deployment.wait_until_ready(client)
            self.completions = [client.add(prompt, self._sampling)[1] for prompt in prompts()]
            while client.num_running:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"the streams have not ended after {_DEADLINE_S:g} s")
                deployment.poll(client)
                disturb(deployment, self.num_tokens)
            self.num_sent = sum(lane.tokens.values())
            deployment.expect_end()
            client.shut_down("all streams have ended")
            client.close()


class Killer:
    """Kills a random worker again and again: mostly once tokens have come again, at times while ranks start."""

    def __init__(self, num_kills: int, num_tokens: int, seed: int, say: Callable[[str], None]) -> None:
        """Spread `num_kills` over the `num_tokens` that all streams together get."""
        self._dice = random.Random(seed)
        self._say = say
        # The last tokens are left alone: a kill after them would hit nobody.
        self._marks = [num_tokens * number // (num_kills + 1) for number in range(1, num_kills + 1)]
        self._victim = ("", -1)
        self._killed_s: float | None = None
        self._early_s = math.inf
        self._seen = 0
        self.kills: list[str] = []
        self.pauses_s: list[float] = []

    def disturb(self, deployment: Deployment, num_tokens: int) -> None:
        """Kill if it is time to."""
        if self._killed_s is not None:
            self._look_for_recovery(deployment, num_tokens)
        if not self._marks:
            return
        if time.monotonic() > self._early_s:
            self._kill(deployment, num_tokens, " while ranks start")
        elif self._killed_s is None and num_tokens >= self._marks[0]:
            self._kill(deployment, num_tokens, "")

    def _look_for_recovery(self, deployment: Deployment, num_tokens: int) -> None:
        name, pid = self._victim
        if deployment.pids[name] == pid:
            # These tokens are from before the kill, on their way until now.
            self._seen = num_tokens
        elif num_tokens > self._seen and self._killed_s is not None:
            self.pauses_s.append(time.monotonic() - self._killed_s)
            self._killed_s, self._early_s = None, math.inf

    def _kill(self, deployment: Deployment, num_tokens: int, remark: str) -> None:
        name = f"rank {self._dice.randrange(WORLD_SIZE)}"
        pid = deployment.pids[name]
        # The client looks when a step has just ended; ranks must die in the middle of one as well.
        time.sleep(self._dice.uniform(0.0, _LATER_S))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # The ranks of the next epoch have not been started yet; the next look may find them.
            return
        self._marks.pop(0)
        now_s = time.monotonic()
        self._victim, self._seen = (name, pid), num_tokens
        self._killed_s = self._killed_s or now_s
        is_early = self._dice.random() < _SHARE_OF_EARLY
        self._early_s = now_s + self._dice.uniform(*_EARLY_S) if is_early else math.inf
        self.kills.append(f"{name} after {num_tokens} tokens{remark}")
        self._say(f"killed {self.kills[-1]}")


def prompts() -> list[list[int]]:
    """Return a prompt for each stream, of different lengths."""
    return [
        [(number * 7 + place * 3) % 190 + 2 for place in range(3 + number * 2)] for number in range(NUM_STREAMS)
    ]


def run_streams(
    config: str, num_kills: int, seed: int, say: Callable[[str], None], num_tokens: int = 400
) -> StreamsReport:
    """Run all streams undisturbed, then with `num_kills` kills, and compare."""
    calm = Streams(config, num_tokens, 0)
    calm.run(lambda deployment, number: None)
    say(f"undisturbed: {calm.num_tokens} tokens")
    killer = Killer(num_kills, calm.num_tokens, seed, say)
    started_s, disturbed = time.monotonic(), Streams(config, num_tokens, 2 * num_kills + 1)
    disturbed.run(killer.disturb)
    pairs = zip(calm.completions, disturbed.completions, strict=True)
    return StreamsReport(
        kills=killer.kills,
        num_equal=sum(expected.token_ids == found.token_ids for expected, found in pairs),
        num_tokens=disturbed.num_tokens,
        num_sent=disturbed.num_sent,
        num_expected=calm.num_tokens,
        pauses_s=killer.pauses_s,
        seconds=time.monotonic() - started_s,
        errors=[completion.error for completion in disturbed.completions if completion.error is not None],
    )
