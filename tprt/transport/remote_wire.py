"""What goes over the TCP connection between a step writer and a rank on another host.

Plain TCP, one connection for each rank, and not ZeroMQ: its end is then the end of that rank, seen at once and
by name, and there is no queue in between where a message could wait without being counted.

    writer to rank    greeting: magic, version, nonce
    rank to writer    hello: magic, version, epoch, rank, nonce, proof that it knows the token
    writer to rank    answer: proof of the same, a text that is empty when the rank is let in; then messages:
                      number, length, bytes
    rank to writer    after each message its number and a length of 0; a control message comes with its length

The proofs keep out strangers and other deployments (`tprt.transport.challenge`), but nobody who can change what
is on the network. Knows nothing of who waits for what.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from urllib.parse import urlsplit

from tprt.errors import TransportError
from tprt.transport.challenge import PROOF_BYTES, is_proven, prove

MAGIC = b"tprtstep"
VERSION = 2
GREETING = struct.Struct("<8sI32s")
HELLO = struct.Struct("<8sIqq32s32s")
ANSWER = struct.Struct("<32sI")
FRAME = struct.Struct("<QQ")
UP = struct.Struct("<QI")
"""How many messages the rank has read, and the bytes of the control message that follows (0: none)."""
MAX_FRAME_BYTES = 1024 * 1024 * 1024
_RANK, _WRITER = "rank", "writer"

# A host that vanishes says nothing: the kernel asks after 5 s of silence and gives up 15 s later. What it has
# not taken by then has the deadline of `send`.
_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3


def pack_greeting(nonce: bytes) -> bytes:
    """Return what the writer says first."""
    return GREETING.pack(MAGIC, VERSION, nonce)


def read_greeting(greeting: bytes) -> bytes:
    """Return the writer's nonce.

    Raises:
        TransportError: it is no writer of this version.
    """
    magic, version, nonce = GREETING.unpack(greeting)
    if (magic, version) != (MAGIC, VERSION):
        raise TransportError(f"it began with {greeting[:12]!r}; expected a coordinator of version {VERSION}")
    return bytes(nonce)


def pack_hello(epoch: int, rank: int, nonce: bytes, greeting_nonce: bytes, token: bytes) -> bytes:
    """Return a rank's hello: `nonce` is its own, `greeting_nonce` that of the writer."""
    without = HELLO.pack(MAGIC, VERSION, epoch, rank, nonce, b"")[:-PROOF_BYTES]
    return without + prove(token, _RANK, greeting_nonce, without)


@dataclass(frozen=True, slots=True)
class RemoteHello:
    """What somebody has said who wants to be let in; `nonce` is its own, and nothing is proven yet."""

    said: bytes
    epoch: int
    rank: int
    nonce: bytes

    def why_unproven(self, greeting_nonce: bytes, token: bytes) -> str:
        """Return why this is no hello of a rank that knows `token`; empty if it is."""
        magic, version = HELLO.unpack(self.said)[:2]
        if (magic, version) != (MAGIC, VERSION):
            return f"it began with {self.said[:12]!r}; expected a tprt rank that speaks version {VERSION}"
        without, proof = self.said[:-PROOF_BYTES], self.said[-PROOF_BYTES:]
        if not is_proven(token, proof, _RANK, greeting_nonce, without):
            return "it does not know the token of this deployment"
        return ""


def read_hello(said: bytes) -> RemoteHello:
    """Return what somebody has said, which may be anything."""
    whole = said.ljust(HELLO.size, b"\0")
    _, _, epoch, rank, nonce, _ = HELLO.unpack(whole)
    return RemoteHello(whole, epoch, rank, nonce)


def pack_answer(reason: str, nonce: bytes, token: bytes) -> bytes:
    """Return the writer's answer to the rank that gave `nonce`: an empty `reason` lets it in."""
    text = reason.encode()
    return ANSWER.pack(prove(token, _WRITER, nonce, text), len(text)) + text


def is_answer_proven(proof: bytes, nonce: bytes, token: bytes) -> bool:
    """Tell whether the writer that lets a rank in knows the token."""
    return is_proven(token, proof, _WRITER, nonce)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `tcp://host:port`.

    Raises:
        TransportError: it is not of that form.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return parts.hostname, parts.port
    raise TransportError(f"address {address!r}; expected tcp://host:port, with port 0 to have one chosen")


def join_address(host: str, port: int) -> str:
    """Return `tcp://host:port`, with brackets around an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def set_options(connection: socket.socket) -> None:
    """Send small messages at once, and notice a host that has vanished."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
