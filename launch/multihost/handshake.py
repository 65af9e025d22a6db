"""How a host proves to node rank 0 that it knows the secret, says who it is, and hears whether it is taken in.

    node rank 0 to host    magic, version, nonce
    host to node rank 0    nonce, proof, card
    node rank 0 to host    proof, why the host is refused (empty: it is taken in)

Each proof is over what goes with it and both nonces. Afterwards nothing is proven any more: whoever can change
what is on the network is not kept out. Knows nothing of who waits for what.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from launch.multihost.card import HostCard
from tprt.transport.challenge import NONCE_BYTES, PROOF_BYTES, is_proven, prove

_MAGIC = b"tprthost"
VERSION = 1
_HOST, _FIRST = "host", "node rank 0"


class Said(NamedTuple):
    """What the other end has said: its nonce, or "", and what is wrong with it, or ""."""

    nonce: bytes
    error: str = ""


def pack_greeting(nonce: bytes) -> bytes:
    """Return what node rank 0 says first."""
    return b"".join((_MAGIC, VERSION.to_bytes(4, "little"), nonce))


def read_greeting(message: bytes) -> Said:
    """Return the nonce of node rank 0."""
    magic, rest = message[: len(_MAGIC)], message[len(_MAGIC) :]
    version, nonce = int.from_bytes(rest[:4], "little"), rest[4:]
    if magic != _MAGIC or len(nonce) != NONCE_BYTES:
        return Said(b"", f"it began with {message[:16]!r}; expected the host of node rank 0 of a deployment")
    if version != VERSION:
        return Said(b"", f"it speaks version {version} of the rendezvous, this host {VERSION}: use one tprt")
    return Said(nonce)


def pack_hello(card: HostCard, nonce: bytes, greeting_nonce: bytes, secret: bytes) -> bytes:
    """Return what a host answers to the greeting."""
    body = card.model_dump_json().encode()
    return nonce + prove(secret, _HOST, greeting_nonce, nonce, body) + body


def read_hello(message: bytes, greeting_nonce: bytes, secret: bytes) -> tuple[Said, HostCard | None]:
    """Return the nonce of a host and its card; None for one that is not to be believed."""
    nonce, proof = message[:NONCE_BYTES], message[NONCE_BYTES : NONCE_BYTES + PROOF_BYTES]
    body = message[NONCE_BYTES + PROOF_BYTES :]
    if not is_proven(secret, proof, _HOST, greeting_nonce, nonce, body):
        return Said(nonce, "its secret is not that of this deployment"), None
    try:
        return Said(nonce), HostCard.model_validate_json(body)
    except ValidationError:
        return Said(nonce, f"it knows the secret and says what no host of version {VERSION} would"), None


def pack_answer(reason: str, nonce: bytes, secret: bytes) -> bytes:
    """Return the answer to the host that gave `nonce`: an empty `reason` takes it in."""
    text = reason.encode()
    return prove(secret, _FIRST, nonce, text) + text


def read_answer(message: bytes, nonce: bytes, secret: bytes) -> str:
    """Return why this host is refused; empty if it is taken in by somebody who knows the secret."""
    proof, text = message[:PROOF_BYTES], message[PROOF_BYTES:]
    if not is_proven(secret, proof, _FIRST, nonce, text):
        return "the secret of this host is not that of node rank 0"
    return text.decode(errors="replace")
