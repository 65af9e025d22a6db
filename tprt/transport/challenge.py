"""Two ends prove to each other that they know one secret, without saying it: HMAC-SHA256 over fresh nonces.

Each end proves under a role of its own, so that what one has said cannot be given back to it. The connection is
neither encrypted nor, by this alone, protected against somebody who can change what is on the network. Knows
nothing of sockets.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

NONCE_BYTES = 32
PROOF_BYTES = 32


def make_nonce() -> bytes:
    """Return 32 bytes that have never been used."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(secret: bytes, role: str, *parts: bytes) -> bytes:
    """Return the proof of `secret` in `role` over `parts`, of which each has a fixed size, or is the last."""
    return hmac.digest(secret, b"\0".join((b"tprt", role.encode(), b"".join(parts))), hashlib.sha256)


def is_proven(secret: bytes, proof: bytes, role: str, *parts: bytes) -> bool:
    """Tell whether `proof` is that of `prove`; takes as long whatever differs."""
    return hmac.compare_digest(proof, prove(secret, role, *parts))
