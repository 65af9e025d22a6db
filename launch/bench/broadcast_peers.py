"""The transports that `tprt bench broadcast` compares: the ring, and what others do, for the benchmark alone.

Each is written as its users write it: nano-vllm pickles into shared memory and sets an event for each rank;
mini-sglang and others publish msgpack over ZeroMQ; many programs broadcast Python objects over gloo. All carry
a head and a body of bytes. Knows nothing of what is measured and of who starts the processes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from ctypes import c_ubyte
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkContext
from multiprocessing.sharedctypes import RawArray
from multiprocessing.synchronize import Event
from typing import Any, Protocol

import msgpack
import zmq

from tprt.errors import TransportTimeoutError
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.link import ShmWorkerLink

WAIT_S = 60.0
HEAD_BYTES = 32
# Around a pickled message: the length, and what pickle adds.
_PICKLE_EXTRA_BYTES = 256
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the processes of one transport need to find each other.

    Attributes:
        run_dir: a folder of their own.
        readers: number of readers.
        shared: memory for one pickled message.
        events: one for each reader.
    """

    run_dir: str
    readers: int
    shared: Any
    events: Sequence[Event]

    @classmethod
    def arrange(cls, context: ForkContext, run_dir: str, readers: int, max_bytes: int) -> Meeting:
        """Prepare for messages of up to `max_bytes`, head included."""
        shared = RawArray(c_ubyte, max_bytes + _PICKLE_EXTRA_BYTES)
        return cls(run_dir, readers, shared, [context.Event() for _ in range(readers)])


class BroadcastWriter(Protocol):
    """The sending end."""

    def send(self, head: bytes, body: bytes) -> None:
        """Send to all readers."""

    def close(self) -> None: ...


class BroadcastReader(Protocol):
    """A receiving end."""

    def receive(self, timeout_s: float) -> bytes | None:
        """Wait for a message with its body; return its head, or None when none came in time."""

    def forget(self) -> None:
        """Drop the sign of a message that was sent before."""

    def close(self) -> None: ...


class _RingWriter:
    """The lane that carries steps to ranks, in the sizes that a deployment has."""

    def __init__(self, meeting: Meeting) -> None:
        self._hub = ShmWorkerHub.listen(f"{meeting.run_dir}/hub", epoch=0, world_size=meeting.readers)
        self._hub.accept_all(WAIT_S)
        self._steps = self._hub.steps

    def send(self, head: bytes, body: bytes) -> None:
        self._steps.send((head, body), WAIT_S)

    def close(self) -> None:
        self._hub.close()


class _RingReader:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._link = ShmWorkerLink.connect(f"{meeting.run_dir}/hub", epoch=0, rank=rank, timeout_s=WAIT_S)
        self._steps = self._link.steps

    def receive(self, timeout_s: float) -> bytes | None:
        try:
            return self._steps.receive(timeout_s)[:HEAD_BYTES]
        except TransportTimeoutError:
            return None

    def forget(self) -> None:
        pass

    def close(self) -> None:
        self._link.close()


class _PickleWriter:
    """One memory, one event for each reader; nothing keeps a message from being written over."""

    def __init__(self, meeting: Meeting) -> None:
        self._memory = memoryview(meeting.shared).cast("B")
        self._events = meeting.events

    def send(self, head: bytes, body: bytes) -> None:
        data = pickle.dumps(("run", head, body))
        self._memory[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")
        self._memory[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = data
        for event in self._events:
            event.set()

    def close(self) -> None:
        pass


class _PickleReader:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._memory = memoryview(meeting.shared).cast("B")
        self._event = meeting.events[rank]

    def receive(self, timeout_s: float) -> bytes | None:
        if not self._event.wait(timeout_s):
            return None
        size = int.from_bytes(self._memory[:_LENGTH_BYTES], "little")
        _, head, _ = pickle.loads(self._memory[_LENGTH_BYTES : _LENGTH_BYTES + size])
        self._event.clear()
        kept: bytes = head
        return kept

    def forget(self) -> None:
        # Set while the message before was read: whoever is woken by it would clear the next one's with it.
        self._event.clear()

    def close(self) -> None:
        pass


class _ZmqWriter:
    """PUB as XPUB, which is the same but tells of subscriptions, so that no reader misses the beginning."""

    def __init__(self, meeting: Meeting) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket.bind(f"ipc://{meeting.run_dir}/pub")
        for reader in range(meeting.readers):
            if not self._socket.poll(int(WAIT_S * 1000)):
                raise TransportTimeoutError(f"{reader} of {meeting.readers} readers subscribed in {WAIT_S:g} s")
            self._socket.recv()

    def send(self, head: bytes, body: bytes) -> None:
        self._socket.send(msgpack.packb((head, body)))

    def close(self) -> None:
        self._context.destroy(linger=0)


class _ZmqReader:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(f"ipc://{meeting.run_dir}/pub")

    def receive(self, timeout_s: float) -> bytes | None:
        self._socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        try:
            head, _ = msgpack.unpackb(self._socket.recv())
        except zmq.Again:
            return None
        kept: bytes = head
        return kept

    def forget(self) -> None:
        pass

    def close(self) -> None:
        self._context.destroy(linger=0)


class _GlooEnd:
    """`torch.distributed.broadcast_object_list`; the writer is rank 0. torch is imported here alone."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        from torch import distributed, set_num_threads

        set_num_threads(1)
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting.run_dir}/store",
            rank=rank,
            world_size=meeting.readers + 1,
            timeout=timedelta(seconds=WAIT_S),
        )
        self._distributed = distributed

    def send(self, head: bytes, body: bytes) -> None:
        self._distributed.broadcast_object_list([(head, body)], src=0)

    def receive(self, timeout_s: float) -> bytes | None:
        """See `BroadcastReader`; a broadcast has the deadline of its group, whatever `timeout_s`."""
        objects: list[Any] = [None]
        self._distributed.broadcast_object_list(objects, src=0)
        kept: bytes = objects[0][0]
        return kept

    def forget(self) -> None:
        pass

    def close(self) -> None:
        # Nobody leaves while another is still in the last broadcast.
        self._distributed.barrier()
        self._distributed.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Transport:
    """One way to broadcast, and how to open its two ends."""

    open_writer: Callable[[Meeting], BroadcastWriter]
    open_reader: Callable[[Meeting, int], BroadcastReader]


OURS = "ring"
TRANSPORTS = {
    OURS: Transport(_RingWriter, _RingReader),
    "pickle_shm": Transport(_PickleWriter, _PickleReader),
    "zmq_pub_sub": Transport(_ZmqWriter, _ZmqReader),
    "gloo": Transport(lambda meeting: _GlooEnd(meeting, 0), lambda meeting, rank: _GlooEnd(meeting, rank + 1)),
}
