"""Rounds: the one way in which ranks of a group wait for each other, over flags in shared memory.

In a round every rank posts the round's number in its own line and waits until all have. What a rank wrote
to shared memory before it posted, all others may read once their wait is over. Knows nothing of tensors.

How a rank waits. It polls its peers' flags for some microseconds, then polls with `sched_yield` in between
(which is what makes more ranks than cores fast: the core goes to the rank that is waited for), then sleeps in
poll(2) on its doorbell, an eventfd, and on the pidfds of its peers, so that a death wakes it at once. The
last rank to post rings those that sleep.

Memory order. Words are aligned and are stored and loaded by one 8-byte move each. x86-64 keeps stores in
order and loads in order, so a flag follows the data it announces. Two cases need more: a sleeper stores
WANTED and then loads flags, while a poster stores its flag and then loads WANTED; if both loads could pass
the stores, a wake-up would be lost. And weaker machines (ARM) order nothing by themselves. CPython has no
fence, but an uncontended `threading.Lock` is an atomic read-modify-write with acquire order and its release
one with release order. One pair lets a store sink in and a load rise into the pair, where they may still
swap; in two pairs on the same lock what comes before the first release cannot pass the second acquire,
which reads what that release wrote. Two pairs are therefore a full fence, at 0.2 us.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import threading
import time
from collections.abc import Callable

from tprt.distributed.shm_memory import ShmGroupMemory, Word, line_start
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

_TOTAL_STORE_ORDER = platform.machine() in ("x86_64", "AMD64")
_HOT_POLLS = 64
_SPIN_US = 500.0
_ATTACH_POLL_MS = 20

# Word is an enum for people; the hot path wants plain ints.
_ROUND, _WANTED, _SIGNATURE = int(Word.ROUND), int(Word.WANTED), int(Word.SIGNATURE)
_COLLECTIVE, _PID, _CLOSED = int(Word.COLLECTIVE), int(Word.PID), int(Word.CLOSED)

_PROCESS_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for I/O",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
}


def _make_full_fence() -> Callable[[], None]:
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def full_fence() -> None:
        acquire()
        release()
        acquire()
        release()

    return full_fence


def _process_state(pid: int) -> str:
    """Describe a process in words from /proc; it may be gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "unknown"
    return _PROCESS_STATES.get(letter, letter)


class ShmRounds:
    """The rounds of one rank.

    Args:
        rank: this rank.
        memory: the group's memory; its descriptors are duplicated, so it may be closed afterwards.
        words: the memory as 8-byte words, `memoryview.cast("Q")`; stays valid until `close`.
        timeout_s: longest wait for one round, in seconds.
        describe: turns a signature into words, for errors.

    Attributes:
        number: the last round that was completed.
    """

    def __init__(
        self,
        rank: int,
        memory: ShmGroupMemory,
        words: memoryview,
        timeout_s: float,
        describe: Callable[[int], str],
    ) -> None:
        self.number = 0
        self._collective = 0
        self._unusable = ""
        self._rank = rank
        self._words = words
        self._timeout_s = timeout_s
        self._describe = describe
        self._mine = line_start(rank)
        self._peers = {line_start(peer): peer for peer in range(memory.world_size) if peer != rank}
        self._spin_ns = int(_SPIN_US * 1000)
        self._full_fence = _make_full_fence()
        self._doorbells = [os.dup(fd) for fd in memory.doorbell_fds]
        self._poll = select.poll()
        self._poll.register(self._doorbells[rank], select.POLLIN)
        self._pidfds: dict[int, int] = {}
        self._gone: set[int] = set()
        words[self._mine + _PID] = os.getpid()

    def begin_collective(self) -> None:
        """Count one more collective, for the errors of peers.

        Raises:
            TransportError: the group was closed, or an earlier round failed.
        """
        if self._unusable:
            raise TransportError(f"rank {self._rank} cannot use this group any more: {self._unusable}")
        self._collective += 1
        self._words[self._mine + _COLLECTIVE] = self._collective

    def complete(self, signature: int) -> None:
        """Post the next round and wait until every rank has posted it.

        Args:
            signature: says what this rank does, from 1 to 2**63 - 1; all ranks must say the same.

        Raises:
            PeerLostError: a rank that has not posted the round is dead or has closed the group.
            TransportTimeoutError: a rank has not posted the round in time.
            TransportError: a rank does something else.
        """
        words, mine = self._words, self._mine
        number = self.number + 1
        signature_place = _SIGNATURE + (number & 1)
        words[mine + signature_place] = signature
        if not _TOTAL_STORE_ORDER:
            self._full_fence()
        words[mine] = number
        self._full_fence()
        for line in self._peers:
            if words[line + _WANTED]:
                self._ring(line)
        for line in self._peers:
            if words[line] < number:
                self._wait(number)
                break
        if not _TOTAL_STORE_ORDER:
            self._full_fence()
        for line in self._peers:
            if words[line + signature_place] != signature:
                self._raise_diverged(line, signature, words[line + signature_place])
        self.number = number

    def _ring(self, line: int) -> None:
        """Wake the sleeping peer if this rank's post was the last one that it waits for."""
        wanted = self._words[line + _WANTED]
        if wanted and self._all_posted(wanted):
            os.eventfd_write(self._doorbells[self._peers[line]], 1)

    def _all_posted(self, number: int) -> bool:
        words = self._words
        return words[self._mine] >= number and all(words[line] >= number for line in self._peers)

    def _wait(self, number: int) -> None:
        words, sched_yield, clock = self._words, os.sched_yield, time.monotonic_ns
        start_ns = clock()
        spin_until_ns = start_ns + self._spin_ns
        polls = 0
        for line in self._peers:
            while words[line] < number:
                polls += 1
                if polls > _HOT_POLLS:
                    sched_yield()
                    if clock() > spin_until_ns:
                        self._sleep(number, start_ns)
                        return

    def _sleep(self, number: int, start_ns: int) -> None:
        """Wait in the kernel until every rank has posted `number`, one is lost, or the time is up."""
        words, wanted = self._words, self._mine + _WANTED
        deadline_ns = start_ns + int(self._timeout_s * 1e9)
        words[wanted] = number
        self._full_fence()
        try:
            while not self._all_posted(number):
                all_known = self._watch_peers()
                self._raise_if_lost(number)
                left_ms = (deadline_ns - time.monotonic_ns()) / 1e6
                if left_ms <= 0:
                    self._raise_timeout(number)
                self._poll_events(left_ms if all_known else min(left_ms, _ATTACH_POLL_MS))
                self._full_fence()
        finally:
            words[wanted] = 0

    def _poll_events(self, timeout_ms: float) -> None:
        doorbell = self._doorbells[self._rank]
        for fd, _ in self._poll.poll(timeout_ms):
            if fd == doorbell:
                self._silence(doorbell)
            else:
                # A dead peer stays readable; it is lost only for rounds that it did not post.
                self._gone.add(next(line for line, pidfd in self._pidfds.items() if pidfd == fd))
                self._poll.unregister(fd)

    @staticmethod
    def _silence(doorbell: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(doorbell)

    def _watch_peers(self) -> bool:
        """Open a pidfd for each peer that has become known; return whether all are."""
        for line in self._peers:
            pid = self._words[line + _PID]
            if pid and line not in self._pidfds and line not in self._gone:
                try:
                    self._pidfds[line] = os.pidfd_open(pid)
                except ProcessLookupError:
                    self._gone.add(line)
                else:
                    self._poll.register(self._pidfds[line], select.POLLIN)
        return len(self._pidfds.keys() | self._gone) == len(self._peers)

    def _raise_if_lost(self, number: int) -> None:
        self._full_fence()
        words = self._words
        for line, peer in self._peers.items():
            closed = words[line + _CLOSED]
            if (closed or line in self._gone) and words[line] < number:
                what = "has closed the group" if closed else "is dead"
                self._unusable = (
                    f"rank {peer} (process {words[line + _PID]}) {what}; rank {self._rank} was waiting for"
                    f" it in collective {self._collective}, its last one was {words[line + _COLLECTIVE]}"
                )
                raise PeerLostError(self._unusable)

    def _raise_timeout(self, number: int) -> None:
        words = self._words
        late = []
        for line, peer in self._peers.items():
            if words[line] < number:
                pid = words[line + _PID]
                process = f"process {pid}, {_process_state(pid)}" if pid else "never joined"
                late.append(f"rank {peer} ({process}), whose last collective was {words[line + _COLLECTIVE]}")
        self._unusable = (
            f"rank {self._rank} has waited {self._timeout_s:g} s in collective {self._collective}"
            f" for {' and '.join(late)}"
        )
        raise TransportTimeoutError(self._unusable)

    def _raise_diverged(self, line: int, mine: int, theirs: int) -> None:
        self._unusable = (
            f"the ranks have diverged: rank {self._rank} is in collective {self._collective},"
            f" {self._describe(mine)}, and rank {self._peers[line]} in {self._words[line + _COLLECTIVE]},"
            f" {self._describe(theirs)}; all ranks must make the same calls"
        )
        raise TransportError(self._unusable)

    def close(self) -> None:
        """Tell the peers, and close the descriptors; idempotent. `words` is not used any more."""
        if not self._doorbells:
            return
        self._words[self._mine + _CLOSED] = 1
        self._full_fence()
        for line, peer in self._peers.items():
            if self._words[line + _WANTED]:
                os.eventfd_write(self._doorbells[peer], 1)
        for fd in [*self._doorbells, *self._pidfds.values()]:
            os.close(fd)
        self._doorbells = []
        self._pidfds = {}
        self._unusable = self._unusable or "it was closed"
