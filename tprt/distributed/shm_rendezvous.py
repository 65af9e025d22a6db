"""How ranks of one host that know nothing but a path come to share memory.

Rank 0 creates the memory and listens on a unix socket; each of the others connects, says who it is, and gets
the descriptors once all are there. A connection stays open meanwhile, so that both ends see a process that
goes away. Knows nothing of what the memory is for.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time

from tprt.distributed.shm_memory import DEFAULT_SLOT_BYTES, MAX_WORLD_SIZE, ShmGroupMemory
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

# Who a rank is and how long it can wait: rank, world size, process id, seconds.
_HELLO = struct.Struct("<QQQd")
# One byte less than a unix socket allows: it is bound under a name that is longer by one.
_MAX_PATH_BYTES = 106
_RETRY_S = 0.01
_MAX_ANSWER_BYTES = 1024
# Rank 0 gives up at the earliest deadline of all ranks and tells who is missing; that takes a moment.
_ANSWER_GRACE_S = 0.2
_GRANTED = b"\x01"
_REFUSALS = {b"\x02": TransportTimeoutError, b"\x03": PeerLostError, b"\x04": TransportError}


def exchange_memory(
    path: str, rank: int, world_size: int, timeout_s: float, slot_bytes: int = DEFAULT_SLOT_BYTES
) -> ShmGroupMemory:
    """Return the memory that rank 0 has created, the same on every rank; the caller closes it.

    Args:
        path: where rank 0 listens; it lies in a directory that is private to this group.
        rank: this rank.
        world_size: number of ranks.
        timeout_s: longest wait until all ranks are there, in seconds.
        slot_bytes: size of a slot; rank 0's counts.

    Raises:
        TransportTimeoutError: names the ranks that did not come in time.
        PeerLostError: a rank went away during the rendezvous.
        TransportError: the path is too long, or the ranks disagree about who they are.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise TransportError(
            f"the rendezvous path {path} has {len(os.fsencode(path))} bytes; a unix socket allows"
            f" {_MAX_PATH_BYTES}: choose a run directory with a shorter path"
        )
    deadline_s = time.monotonic() + timeout_s
    if rank == 0:
        return _Host(path, world_size, deadline_s, slot_bytes).gather()
    return _join(path, rank, world_size, deadline_s)


class _Host:
    """Rank 0's side: collects the other ranks and hands each of them the descriptors."""

    def __init__(self, path: str, world_size: int, deadline_s: float, slot_bytes: int) -> None:
        self._path = path
        self._slot_bytes = slot_bytes
        self._world_size = world_size
        self._deadline_s = deadline_s
        self._connections: dict[int, socket.socket] = {}
        self._pids = {0: os.getpid()}

    def gather(self) -> ShmGroupMemory:
        with contextlib.ExitStack() as cleanup:
            listener = cleanup.enter_context(_listen(self._path))
            cleanup.callback(self._close, listener)
            try:
                while len(self._pids) < self._world_size:
                    self._wait_for_event(listener)
                return self._hand_out()
            except TransportError as error:
                self._refuse_all(error)
                raise

    def _wait_for_event(self, listener: socket.socket) -> None:
        """Take one more rank, or notice that one has gone."""
        left_s = self._deadline_s - time.monotonic()
        connections = list(self._connections.values())
        readable = select.select([listener, *connections], [], [], max(left_s, 0))[0]
        if listener in readable:
            self._accept(listener)
        elif readable:
            rank = next(rank for rank, connection in self._connections.items() if connection in readable)
            raise PeerLostError(f"rank {rank} (process {self._pids[rank]}) went away during the rendezvous")
        elif left_s <= 0:
            missing = [str(rank) for rank in range(self._world_size) if rank not in self._pids]
            raise TransportTimeoutError(
                f"rank {', '.join(missing)} of {self._world_size} did not come to the rendezvous at"
                f" {self._path} in time"
            )

    def _accept(self, listener: socket.socket) -> None:
        connection = listener.accept()[0]
        connection.settimeout(max(self._deadline_s - time.monotonic(), _RETRY_S))
        try:
            hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        except OSError:
            hello = b""
        if len(hello) < _HELLO.size:
            connection.close()
            return
        rank, world_size, pid, patience_s = _HELLO.unpack(hello)
        if world_size != self._world_size or not 0 < rank < world_size or rank in self._pids:
            self._connections[-1] = connection  # it is told as well
            raise TransportError(
                f"process {pid} came to the rendezvous at {self._path} as rank {rank} of {world_size};"
                f" expected one each of the ranks 1 to {self._world_size - 1} of {self._world_size}:"
                " give every rank the same world size and a rank of its own"
            )
        self._connections[rank] = connection
        self._pids[rank] = pid
        self._deadline_s = min(self._deadline_s, time.monotonic() + patience_s)

    def _hand_out(self) -> ShmGroupMemory:
        memory = ShmGroupMemory.create(self._world_size, self._slot_bytes)
        for rank, pid in self._pids.items():
            memory.set_pid(rank, pid)
        for rank, connection in self._connections.items():
            try:
                socket.send_fds(connection, [_GRANTED], list(memory.fds))
            except OSError as error:
                memory.close()
                raise PeerLostError(
                    f"rank {rank} (process {self._pids[rank]}) went away during the rendezvous"
                ) from error
        return memory

    def _refuse_all(self, error: TransportError) -> None:
        code = next(code for code, kind in _REFUSALS.items() if isinstance(error, kind))
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send((code + str(error).encode())[:_MAX_ANSWER_BYTES])

    def _close(self, listener: socket.socket) -> None:
        for connection in self._connections.values():
            connection.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def _listen(path: str) -> socket.socket:
    """Listen at `path`, over what an earlier process has left; the path appears once it can be connected to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unfinished = f"{path}~"
    try:
        for stale in (path, unfinished):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stale)
        listener.bind(unfinished)
        listener.listen(MAX_WORLD_SIZE)
        os.rename(unfinished, path)
    except OSError as error:
        listener.close()
        raise TransportError(
            f"cannot listen at {path}: {error}; the run directory must exist and be writable"
        ) from error
    return listener


def _join(path: str, rank: int, world_size: int, deadline_s: float) -> ShmGroupMemory:
    with _connect(path, rank, deadline_s) as connection:
        try:
            patience_s = max(deadline_s - time.monotonic(), 0)
            connection.settimeout(patience_s + _ANSWER_GRACE_S)
            connection.sendall(_HELLO.pack(rank, world_size, os.getpid(), patience_s))
            answer, fds, _, _ = socket.recv_fds(
                connection, _MAX_ANSWER_BYTES, MAX_WORLD_SIZE + 1, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError as error:
            raise TransportTimeoutError(f"rank {rank} met rank 0 at {path}, which is stuck") from error
        except OSError as error:
            raise PeerLostError(f"rank 0 went away during the rendezvous at {path}: {error}") from error
    if answer == _GRANTED:
        return ShmGroupMemory.from_fds(fds)
    for fd in fds:
        os.close(fd)
    if not answer:
        raise PeerLostError(f"rank 0 went away during the rendezvous at {path}, before all ranks had come")
    kind = _REFUSALS.get(answer[:1], TransportError)
    raise kind(f"rank 0 has called the rendezvous off: {answer[1:].decode(errors='replace')}")


def _connect(path: str, rank: int, deadline_s: float) -> socket.socket:
    """Connect to rank 0, which may not have started yet."""
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            if time.monotonic() >= deadline_s:
                found = "nobody listens there: rank 0 has died" if os.path.exists(path) else "it never came"
                raise TransportTimeoutError(
                    f"rank {rank} was waiting for rank 0 at {path}, but {found}"
                ) from error
        time.sleep(_RETRY_S)
