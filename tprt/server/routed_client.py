"""The client of a deployment: one engine or several replicas, each request at the one that was chosen.

Requests of a replica whose ranks are replaced wait there, since their tokens come back with its ranks. Those
of a replica that is lost go on at another from the tokens that they have, once: one whose second replica is
lost as well may be what ends them. The end of all replicas is the end of the engine. One client serves one
thread. Knows nothing of HTTP and of how the coordinators were started.
"""

from __future__ import annotations

import itertools
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tprt.errors import EngineDeadError
from tprt.log import get_logger
from tprt.messages import EngineReady, EngineStats, SamplingParams
from tprt.server.completion import Completion
from tprt.server.engine_client import EngineClient, RequestLane
from tprt.server.replica_router import ReplicaRouter, ReplicaState
from tprt.server.tokenizer import Tokenizer

_LOG = get_logger(__name__)


class ReplicaLane(RequestLane, Protocol):
    """A connection that can be waited for with others: see `tprt.transport.zmq_socket.RequestClient`."""

    @property
    def loss(self) -> str | None: ...

    def filenos(self) -> tuple[int, ...]: ...


def _ignore(request_id: int) -> None:
    """Take no note of news."""


@dataclass(slots=True)
class _Routed:
    """A request, where it is, and the hashes of its leading blocks."""

    completion: Completion
    replica: int
    hashes: list[bytes]
    was_moved: bool = False


class RoutedClient:
    """Requests in flight over all replicas, by the ids that this client gave them.

    Attributes:
        engines: the client of each replica.
        losses: why a replica is lost, by its number.
    """

    def __init__(
        self,
        lanes: Sequence[ReplicaLane],
        tokenizer: Tokenizer | None,
        router: ReplicaRouter,
        on_news: Callable[[int], None] = _ignore,
    ) -> None:
        """Assign only.

        Args:
            lanes: the connection to the coordinator of each replica.
            tokenizer: turns tokens into text; None where the checkpoint has none.
            router: chooses among the replicas.
            on_news: called by `poll` for each token, end, refusal or loss, with the request's id; its
                completion has been brought up to date.
        """
        ids = itertools.count()
        self.engines = [EngineClient(lane, tokenizer, self._take_news, ids) for lane in lanes]
        self.losses: dict[int, str] = {}
        self._lanes = lanes
        self._router = router
        self._on_news = on_news
        self._requests: dict[int, _Routed] = {}
        self._seen_stats: list[EngineStats | None] = [None] * len(lanes)

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return sum(engine.num_running for engine in self.engines)

    def replica_of(self, request_id: int) -> int:
        """Return where a request is that has not ended."""
        return self._requests[request_id].replica

    def state(self, replica: int) -> ReplicaState:
        """Return whether a replica can take requests."""
        return self._router.state(replica)

    def hello(self) -> None:
        """Ask to be told when each replica is ready."""
        for engine in self.engines:
            engine.hello()

    def add(self, prompt_token_ids: list[int], sampling: SamplingParams) -> tuple[int, Completion]:
        """Send a request to the replica where it costs least; `poll` brings its tokens.

        Raises:
            InvalidRequestError: see `EngineClient.add`.
        """
        if len(self.engines) > 1:
            # What cannot be sent cannot be hashed either.
            self.engines[0].check(prompt_token_ids, sampling)
        hashes = self._router.hash_tokens(prompt_token_ids)
        replica = self._choose(hashes, len(prompt_token_ids))
        request_id, completion = self.engines[replica].add(prompt_token_ids, sampling)
        self._requests[request_id] = _Routed(completion, replica, hashes)
        return request_id, completion

    def abort(self, request_id: int) -> None:
        """Give the request up; it ends with finish reason `abort`."""
        if (routed := self._requests.pop(request_id, None)) is not None:
            self.engines[routed.replica].abort(request_id)

    def poll(self, timeout_s: float) -> dict[int, EngineReady]:
        """Take in what has come, waiting up to `timeout_s` for the first message.

        Returns:
            The greetings among it, by replica.

        Raises:
            EngineDeadError: no replica can go on.
        """
        if len(self.losses) == len(self.engines):
            raise EngineDeadError("; ".join(self.losses.values()))
        if len(self.engines) == 1:
            return self._poll_each(timeout_s)
        num_before = self._num_received
        greetings = self._poll_each(0.0)
        if self._num_received == num_before and timeout_s > 0:
            self._wait(timeout_s)
            greetings = self._poll_each(0.0)
        return greetings

    def shut_down(self, reason: str) -> None:
        """Tell every replica to end."""
        for engine in self.engines:
            engine.shut_down(reason)

    def close(self, flush: bool = True) -> None:
        """Close the lanes; `flush`: once what was sent has left, or a second has passed."""
        for engine in self.engines:
            engine.close(flush)

    @property
    def _num_received(self) -> int:
        return sum(engine.num_received for engine in self.engines)

    def _choose(self, hashes: Sequence[bytes], num_tokens: int) -> int:
        if len(self.engines) == 1:
            return 0
        return self._router.choose(hashes, num_tokens, [engine.load for engine in self.engines])

    def _wait(self, timeout_s: float) -> None:
        """Wait for a lane's signal, which comes once for what came after its last empty `receive`."""
        poller = select.poll()
        for number, lane in enumerate(self._lanes):
            for fd in lane.filenos() if number not in self.losses else ():
                poller.register(fd, select.POLLIN)
        poller.poll(timeout_s * 1000)

    def _poll_each(self, timeout_s: float) -> dict[int, EngineReady]:
        greetings = {}
        for number, (lane, engine) in enumerate(zip(self._lanes, self.engines, strict=True)):
            if number in self.losses:
                continue
            try:
                ready = engine.poll(timeout_s)
                if lane.loss is not None:
                    raise EngineDeadError("the coordinator has ended")
            except EngineDeadError as error:
                self._lose(number, error)
                continue
            if ready is not None:
                greetings[number] = ready
                self._take_blocks(number, ready.num_blocks)
            self._take_stats(number, engine.stats)
        return greetings

    def _take_stats(self, number: int, stats: EngineStats | None) -> None:
        if stats is self._seen_stats[number] or stats is None:
            return
        self._seen_stats[number] = stats
        if stats.is_serving:
            self._take_blocks(number, stats.num_blocks)
        else:
            self._router.is_replaced(number)

    def _take_blocks(self, number: int, num_blocks: int) -> None:
        was_replaced = self._router.state(number) is ReplicaState.REPLACING
        self._router.serves(number, num_blocks)
        if was_replaced:
            # Its requests are computed again, and nothing else of what it had is there.
            for routed in self._requests.values():
                if routed.replica == number:
                    self._router.note(number, routed.hashes)

    def _take_news(self, request_id: int) -> None:
        routed = self._requests[request_id]
        if routed.completion.finished:
            del self._requests[request_id]
            self._note_end(routed)
        self._on_news(request_id)

    def _note_end(self, routed: _Routed) -> None:
        """Note that the output is in the prefix cache too, where the next turn of a conversation finds it."""
        completion = routed.completion
        if len(self.engines) > 1 and completion.error is None:
            # The last token was never computed.
            tokens = [*completion.prompt_token_ids, *completion.token_ids][:-1]
            self._router.note(routed.replica, self._router.hash_tokens(tokens, routed.hashes))

    def _lose(self, number: int, error: EngineDeadError) -> None:
        """Go on without a replica.

        Raises:
            EngineDeadError: it was the last one.
        """
        self.losses[number] = str(error)
        self._router.is_lost(number)
        if len(self.losses) == len(self.engines):
            raise error
        unfinished = self.engines[number].hand_over()
        if unfinished:
            _LOG.warning("replica %d is lost; its %d requests go on at others", number, len(unfinished))
        for request_id, completion in unfinished.items():
            self._move(request_id, completion, str(error))

    def _move(self, request_id: int, completion: Completion, cause: str) -> None:
        routed = self._requests[request_id]
        if routed.was_moved:
            completion.lose(f"two replicas that had the request have failed, the second of this: {cause}")
            del self._requests[request_id]
            self._on_news(request_id)
            return
        num_tokens = len(completion.prompt_token_ids) + len(completion.token_ids)
        routed.replica, routed.was_moved = self._choose(routed.hashes, num_tokens), True
        self.engines[routed.replica].take_over(request_id, completion)
