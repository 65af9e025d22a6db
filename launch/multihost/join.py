"""How another host comes to the host of node rank 0, which may listen later, or be away for a while.

Knows nothing of what the hosts say to each other afterwards.
"""

from __future__ import annotations

import socket
import time

from launch.multihost.card import HostCard
from launch.multihost.clock import clock_s
from launch.multihost.frames import FrameLane
from launch.multihost.handshake import pack_hello, read_answer, read_greeting
from tprt.errors import ConfigError, TransportTimeoutError
from tprt.transport.challenge import make_nonce

_RETRY_S = 0.2
# The host of node rank 0 answers at once, or is between two groups of ranks.
_ANSWER_S = 10.0
_CONNECT_S = 3.0


def join(host: str, port: int, card: HostCard, secret: bytes, timeout_s: float) -> FrameLane:
    """Connect to the host of node rank 0 and be taken in.

    Raises:
        ConfigError: it refuses this host, or is no host of this deployment; says why.
        TransportTimeoutError: it did not answer in time; says what was in the way last.
    """
    deadline_s = time.monotonic() + timeout_s
    obstacle = "no attempt was made"
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            lane = FrameLane(socket.create_connection((host, port), min(left_s, _CONNECT_S)))
        except OSError as error:
            obstacle = error.strerror or str(error)
            time.sleep(min(_RETRY_S, left_s))
            continue
        obstacle = _introduce(lane, card, secret, min(left_s, _ANSWER_S))
        if not obstacle:
            lane.trust()
            return lane
        lane.close()
        time.sleep(_RETRY_S)
    raise TransportTimeoutError(
        f"node rank {card.node_rank}: the host of node rank 0 did not answer at {host}, port {port}, within"
        f" {timeout_s:g} s: {obstacle} (hosts.rdzv_endpoint, hosts.join_timeout_s)"
    )


def _introduce(lane: FrameLane, card: HostCard, secret: bytes, timeout_s: float) -> str:
    """Return why there was no answer; empty if this host is taken in.

    Raises:
        ConfigError: it is not, and will not be.
    """
    greeting = lane.wait_for_message(timeout_s)
    if greeting is None:
        return lane.loss or "it lets nobody in"
    said = read_greeting(greeting)
    nonce = make_nonce()
    reason = said.error
    if not reason:
        now = card.model_copy(update={"clock_s": clock_s()})
        lane.send(pack_hello(now, nonce, said.nonce, secret))
        answer = lane.wait_for_message(timeout_s)
        if answer is None:
            return lane.loss or "it does not answer"
        reason = read_answer(answer, nonce, secret)
    if reason:
        lane.close()
        raise ConfigError(f"the host of node rank 0 at {lane.address} refuses this host: {reason}")
    return ""
