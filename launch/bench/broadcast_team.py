"""One transport's processes for `tprt bench broadcast`: a writer and its readers, which take turns on order.

They are forked, so that they start in milliseconds and hold nothing but what they use; whoever starts them has
one thread and no torch. They ignore Ctrl-C, which is the parent's business, and die with the parent. Knows
nothing of how the results are summed up.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_uint64
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any

from launch.bench.broadcast_peers import (
    HEAD_BYTES,
    TRANSPORTS,
    WAIT_S,
    BroadcastReader,
    BroadcastWriter,
    Meeting,
)
from launch.bench.out_of_reach import start_out_of_reach
from launch.parent_death import PARENT_PID, die_with_parent
from tprt.errors import TransportError, TransportTimeoutError

# Turn, number of the message in it, monotonic nanoseconds of the sending, whether it is the turn's last.
_HEAD = struct.Struct("<QQQQ")
assert _HEAD.size == HEAD_BYTES
# Acknowledgements of different readers lie on cache lines of their own.
_ACK_STRIDE = 8
_TURN_SHIFT = 32
# Between two looks of the writer at the acknowledgements.
_ACK_LOOK_S = 100e-6
# A reader that hears nothing for so long looks whether the turn is over and its last message was lost.
_LOST_LOOK_S = 0.1
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What to do next.

    Attributes:
        number: counts the turns of a team; from 1.
        num_bytes: size of a message.
        max_messages: messages at most.
        max_s: seconds at most, but for the silence.
        gap_s: mean of the random pause before a message, after every reader has got the one before; None: send
            without a pause and wait for nobody.
        silence_s: pause before the first message, when the readers wait already.
    """

    number: int
    num_bytes: int
    max_messages: int
    max_s: float
    gap_s: float | None
    silence_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Spoken:
    """What the writer did: messages sent, and when it began on the first."""

    sent: int
    first_ns: int


@dataclass(frozen=True, slots=True)
class Heard:
    """What a reader got.

    Attributes:
        latencies_ns: from before the sending to after the message was there as Python objects.
        last_ns: when the last one came.
        silent_cpu_s: CPU seconds of the whole process until the first message came.
        silent_s: seconds of that wait.
    """

    latencies_ns: list[int]
    last_ns: int
    silent_cpu_s: float
    silent_s: float


class Team:
    """A writer, its readers and the pipes to them."""

    def __init__(self, transport: str, run_dir: str, readers: int, max_bytes: int) -> None:
        """Prepare; `start` starts the processes."""
        self.transport = transport
        context = multiprocessing.get_context("fork")
        meeting = Meeting.arrange(context, run_dir, readers, max_bytes)
        acks = RawArray(c_uint64, readers * _ACK_STRIDE)
        pipes = [context.Pipe() for _ in range(readers + 1)]
        self._connections = [pipe[0] for pipe in pipes]
        # The parent holds both ends: a process that ends is seen by its sentinel.
        self._their_ends = [pipe[1] for pipe in pipes]
        self._processes: list[ForkProcess] = [
            context.Process(
                target=_play, args=(transport, meeting, place - 1, pipes[place][1], acks), daemon=True
            )
            for place in range(readers + 1)
        ]
        self._turns = 0

    def start(self) -> None:
        """Start all processes."""
        start_out_of_reach(self._processes)

    def wait_ready(self) -> None:
        """Wait until all of them have met."""
        for place in range(len(self._processes)):
            self._hear(place, WAIT_S)

    def take_turn(
        self, num_bytes: int, max_messages: int, max_s: float, gap_s: float | None, silence_s: float = 0.0
    ) -> tuple[Spoken, list[Heard]]:
        """Let the writer send and the readers receive, as `Turn` says.

        Raises:
            TransportError: a process failed or does not answer.
        """
        self._turns += 1
        turn = Turn(self._turns, num_bytes, max_messages, max_s, gap_s, silence_s)
        limit_s = WAIT_S + max_s + silence_s
        writer, *readers = range(len(self._processes))
        for reader in readers:
            self._connections[reader].send(turn)
        for reader in readers:
            self._hear(reader, WAIT_S)
        self._connections[writer].send(turn)
        spoken: Spoken = self._hear(writer, limit_s)
        for reader in readers:
            # For those that lost the last message.
            self._connections[reader].send(None)
        return spoken, [self._hear(reader, WAIT_S) for reader in readers]

    def stop(self) -> None:
        """Let the processes close their ends and go."""
        for connection in self._connections:
            connection.send(None)
        deadline_s = time.monotonic() + _STOP_S
        for process in self._processes:
            process.join(max(deadline_s - time.monotonic(), 0.0))

    def kill(self) -> None:
        """End what still runs and release everything."""
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for connection in (*self._connections, *self._their_ends):
            connection.close()

    def _hear(self, place: int, timeout_s: float) -> Any:
        connection = self._connections[place]
        sentinels = [process.sentinel for process in self._processes]
        ready = wait([connection, *sentinels], timeout_s)
        if connection in ready:
            return connection.recv()
        names = [_name(place - 1) for place in range(len(self._processes))]
        ended = [
            f"{name} ended with {process.exitcode}"
            for name, process in zip(names, self._processes, strict=True)
            if process.exitcode is not None
        ]
        reason = ", ".join(ended) or f"{names[place]} has not answered for {timeout_s:g} s"
        raise TransportError(f"the broadcast bench got no result of {self.transport}: {reason}")


@contextmanager
def running(teams: Sequence[Team]) -> Iterator[None]:
    """Start the teams, wait until each has met, and leave no process behind."""
    try:
        for team in teams:
            team.start()
        for team in teams:
            team.wait_ready()
        yield
        for team in teams:
            team.stop()
    finally:
        for team in teams:
            team.kill()


def _name(rank: int) -> str:
    return "the writer" if rank < 0 else f"reader {rank}"


def _play(transport: str, meeting: Meeting, rank: int, orders: Connection, acks: Any) -> None:
    """Be the writer (rank -1) or a reader until told to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    os.environ[PARENT_PID] = str(parent.pid)
    die_with_parent()
    end: Any
    if rank < 0:
        end = TRANSPORTS[transport].open_writer(meeting)
        orders.send("ready")
        while (turn := _next_order(orders)) is not None:
            orders.send(_speak(end, turn, acks))
    else:
        end = TRANSPORTS[transport].open_reader(meeting, rank)
        orders.send("ready")
        while (turn := _next_order(orders)) is not None:
            end.forget()
            orders.send("ready")
            orders.send(_listen(end, turn, orders, (acks, rank * _ACK_STRIDE)))
    end.close()


def _next_order(orders: Connection) -> Turn | None:
    turn: Turn | None = orders.recv()
    return turn


def _speak(writer: BroadcastWriter, turn: Turn, acks: Any) -> Spoken:
    body = bytes(turn.num_bytes - HEAD_BYTES)
    dice = random.Random(turn.number)
    time.sleep(turn.silence_s)
    first_ns = time.monotonic_ns()
    until_ns = first_ns + int(turn.max_s * 1e9)
    for message in range(1, turn.max_messages + 1):
        if turn.gap_s is not None:
            time.sleep(turn.gap_s * dice.uniform(0.5, 1.5))
        sent_ns = time.monotonic_ns()
        is_last = message == turn.max_messages or sent_ns > until_ns
        writer.send(_HEAD.pack(turn.number, message, sent_ns, is_last), body)
        if turn.gap_s is not None:
            _wait_for(acks, turn.number << _TURN_SHIFT | message)
        if is_last:
            break
    return Spoken(message, first_ns)


def _wait_for(acks: Any, wanted: int) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while min(acks[::_ACK_STRIDE]) < wanted:
        if time.monotonic() > deadline_s:
            raise TransportTimeoutError(f"a reader has not acknowledged message {wanted} for {WAIT_S:g} s")
        time.sleep(_ACK_LOOK_S)


def _listen(reader: BroadcastReader, turn: Turn, orders: Connection, ack: tuple[Any, int]) -> Heard:
    acks, own = ack
    # With a pause nothing is lost, and a reader that looked up now and then would not be idle.
    look_s = _LOST_LOOK_S if turn.gap_s is None else WAIT_S
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    silent_s = silent_cpu_s = 0.0
    latencies_ns: list[int] = []
    last = last_ns = is_last = 0
    while not is_last:
        head = reader.receive(look_s)
        now_ns = time.monotonic_ns()
        if head is None:
            if orders.poll():
                break
            continue
        number, message, sent_ns, ends = _HEAD.unpack(head)
        # A message that was written over another may be seen twice, and in a later turn.
        if number != turn.number or message <= last:
            continue
        if not latencies_ns:
            silent_s, silent_cpu_s = now_ns / 1e9 - begun_s, time.process_time() - begun_cpu_s
        last, last_ns, is_last = message, now_ns, ends
        latencies_ns.append(now_ns - sent_ns)
        acks[own] = number << _TURN_SHIFT | message
    orders.recv()
    return Heard(latencies_ns, last_ns, silent_cpu_s, silent_s)
