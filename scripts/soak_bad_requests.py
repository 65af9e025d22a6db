"""Requests that a server must refuse: what they are, and whether an answer refuses them. Sends nothing."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
# More than any server takes, announced; of it only a little is sent.
_HUGE_BYTES = 1 << 33
_HUGE_SENT = 1 << 18
_DEEP = 100_000


@dataclass(frozen=True, slots=True)
class BadRequest:
    """What is sent, and the statuses one of which must come; `may_close`: or the end of the connection."""

    kind: str
    data: bytes
    statuses: tuple[int, ...] = (400, 422)
    may_close: bool = False

    def refuses(self, status: int | None) -> bool:
        """Whether this status, or the end of the connection (None), is the refusal that there must be."""
        return self.may_close if status is None else status in self.statuses


def bad_requests(model: str) -> list[BadRequest]:
    """Return one of each kind."""
    good = {"model": model, "prompt": "Hello", "max_tokens": 4}
    chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    bodies = {
        "malformed JSON": (_COMPLETIONS, b'{"model": "x", "prompt": '),
        "no JSON": (_CHAT, b"\x00\x01\x02 what?"),
        "not UTF-8": (_COMPLETIONS, b'{"model": "%s", "prompt": "\xff\xfe\xc3"}' % model.encode()),
        "half a surrogate pair": (_COMPLETIONS, b'{"model": "%s", "prompt": "\\ud800"}' % model.encode()),
        "deep JSON": (_COMPLETIONS, b'{"prompt": ' + b"[" * _DEEP),
        "a list": (_COMPLETIONS, b"[]"),
        "nothing": (_CHAT, b""),
        "wrong type": (_COMPLETIONS, _json(good | {"max_tokens": "many"})),
        "no prompt": (_COMPLETIONS, _json({"model": model})),
        "prompt of a wrong type": (_COMPLETIONS, _json(good | {"prompt": {"text": "Hello"}})),
        "messages of a wrong type": (_CHAT, _json(chat | {"messages": "Hello"})),
        "role of a wrong type": (_CHAT, _json(chat | {"messages": [{"role": 1, "content": "Hello"}]})),
        "temperature NaN": (_COMPLETIONS, _json(good | {"temperature": float("nan")})),
        "temperature below 0": (_CHAT, _json(chat | {"temperature": -1})),
        "top_p 0": (_COMPLETIONS, _json(good | {"top_p": 0, "stream": True})),
        "no tokens": (_COMPLETIONS, _json(good | {"max_tokens": 0})),
        "token id below 0": (_COMPLETIONS, _json(good | {"prompt": [1, -2]})),
        "token id beyond all": (_COMPLETIONS, _json(good | {"prompt": [1, 2**31 - 1], "stream": True})),
        "token id of 100 bits": (_COMPLETIONS, _json(good | {"prompt": [2**100]})),
        "prompt too long": (_COMPLETIONS, _json(good | {"prompt": [5] * 200_000, "stream": True})),
        "text too long": (_CHAT, _json(chat | {"messages": [{"role": "user", "content": "word " * 100_000}]})),
        "schema that is none": (_CHAT, _json(chat | {"response_format": _WRONG_SCHEMA})),
    }
    requests = [BadRequest(kind, post(path, body)) for kind, (path, body) in bodies.items()]
    unknown = _json(good | {"model": "a model that nobody has"})
    head = f"POST {_COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {_HUGE_BYTES}\r\n\r\n".encode()
    return [
        *requests,
        BadRequest("unknown model", post(_COMPLETIONS, unknown), (404,)),
        BadRequest("unknown path", post("/v1/nowhere", b"{}"), (404,)),
        BadRequest("wrong method", b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", (405,)),
        BadRequest("huge body", head + b" " * _HUGE_SENT, (400, 413), may_close=True),
        BadRequest("no HTTP", b"\x16\x03\x01 hello, is this TLS?\r\n\r\n", (400,), may_close=True),
    ]


_WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}


def post(path: str, body: bytes) -> bytes:
    """Return the bytes of a POST of JSON, or of what claims to be it."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode() + b"\r\n" + body


def cut(draw: random.Random, data: bytes) -> bytes:
    """Return the beginning of a request: some of its head, or some of its body."""
    return data[: draw.randint(1, len(data) - 1)]


def _json(body: object) -> bytes:
    return json.dumps(body).encode()
