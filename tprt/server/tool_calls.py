"""Finds the tool calls in a model's output while it comes, and passes the rest on as plain text.

Two ways of writing them are known: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen)
and an output that is `{"name": ..., "parameters": {...}}` from its beginning (Llama 3.1 and later). Text that
may still become a call is held back, and comes as it was when it turns out to be none. What the arguments say
is not looked at: as with OpenAI, a model may write some that are no JSON. Knows nothing of which tools there
are.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Literal, Protocol

from tprt.server.tool_call_object import ObjectState, ToolCallObject

ToolCallStyle = Literal["hermes", "llama"]

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
# Between calls some models write a semicolon.
_BEFORE_LLAMA_CALL = re.compile(r"\s*[;,]?\s*(<\|python_tag\|>)?\s*")
_ID_BYTES = 12
# White space that has grown longer belongs to no call.
_MAX_HELD = 64


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of a tool call.

    Attributes:
        index: number of the call in this output.
        id, name: in the first delta of a call only.
        arguments: the next part of the arguments' JSON text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Piece = str | ToolCallDelta


class ToolCallParser(Protocol):
    """Takes the text of one output, piece by piece."""

    def feed(self, text: str) -> list[Piece]:
        """Take the next text; return what is certain with it: plain text and parts of calls, in their order."""
        ...

    def finish(self) -> list[Piece]:
        """Return what was held back, since no more text comes."""
        ...


def make_tool_call_parser(style: ToolCallStyle) -> ToolCallParser:
    """Return a parser for one output."""
    return _HermesParser() if style == "hermes" else _LlamaParser()


class _Parser:
    """What both styles share: the text that waits, and the call that is being read."""

    def __init__(self) -> None:
        self._held = ""
        self._object: ToolCallObject | None = None
        # What belongs to the call before its object, for the case that it is none.
        self._before_object = ""
        self._id: str | None = None
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """See `ToolCallParser`."""
        pieces: list[Piece] = []
        self._held += text
        while self._read_object(pieces) if self._object is not None else self._read_outside(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """See `ToolCallParser`."""
        if self._object is not None:
            text = "" if self._object.is_call else self._before_object + self._object.text
        else:
            text = self._rest()
        self._held, self._object = "", None
        return [text] if text else []

    def _read_outside(self, pieces: list[Piece]) -> bool:
        """Read on where no object is; tell whether there is more to do with what is held."""
        raise NotImplementedError

    def _rest(self) -> str:
        """Return what of the held text is plain after all."""
        raise NotImplementedError

    def _after_object(self, is_call: bool) -> None:
        """Go on behind an object."""
        raise NotImplementedError

    def _begin_object(self, before: str) -> None:
        self._object = ToolCallObject()
        self._before_object = before

    def _read_object(self, pieces: list[Piece]) -> bool:
        call = self._object
        assert call is not None
        self._held = self._held[call.feed(self._held) :]
        if call.is_call:
            self._add_delta(call, pieces)
        if call.state is ObjectState.OPEN:
            return False
        if not call.is_call:
            pieces.append(self._before_object + call.text)
        self._object = None
        self._id = None
        self._after_object(call.is_call)
        return True

    def _add_delta(self, call: ToolCallObject, pieces: list[Piece]) -> None:
        arguments = call.take_arguments()
        if self._id is None:
            self._id = f"call_{secrets.token_hex(_ID_BYTES)}"
            self._num_calls += 1
            pieces.append(ToolCallDelta(self._num_calls - 1, self._id, call.name, arguments))
        elif arguments:
            pieces.append(ToolCallDelta(self._num_calls - 1, None, None, arguments))


class _HermesParser(_Parser):
    """Calls in tags, anywhere in the text; white space next to a tag belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self._expects_close = False

    def _read_outside(self, pieces: list[Piece]) -> bool:
        if self._expects_close:
            return self._read_close()
        at = self._held.find(OPEN_TAG)
        if at >= 0:
            num_plain = len(self._held[:at].rstrip())
            self._take_plain(num_plain, pieces)
            length = at - num_plain + len(OPEN_TAG)
            self._begin_object(self._held[:length])
            self._held = self._held[length:]
            return True
        self._take_plain(len(self._held) - self._num_undecided(), pieces)
        return False

    def _take_plain(self, length: int, pieces: list[Piece]) -> None:
        if length:
            pieces.append(self._held[:length])
            self._held = self._held[length:]

    def _num_undecided(self) -> int:
        """Return how much of the end may belong to a tag."""
        length = len(self._held)
        at = self._held.rfind("<")
        is_undecided = at >= 0 and OPEN_TAG.startswith(self._held[at:])
        num_plain = len(self._held[: at if is_undecided else length].rstrip())
        return length - num_plain if length - num_plain <= _MAX_HELD else 0

    def _read_close(self) -> bool:
        """Pass over the end tag, which a model may forget, or write after one brace too many."""
        tag = self._held.lstrip(" \t\r\n}")
        if tag.startswith(CLOSE_TAG):
            self._held = tag[len(CLOSE_TAG) :]
        elif CLOSE_TAG.startswith(tag) and len(self._held) <= _MAX_HELD:
            return False
        self._expects_close = False
        return True

    def _after_object(self, is_call: bool) -> None:
        self._expects_close = is_call

    def _rest(self) -> str:
        if self._expects_close or (self._num_calls and self._held.isspace()):
            return ""
        return self._held


class _LlamaParser(_Parser):
    """Calls from the beginning of the output, one after the other; from anything else on, all is plain."""

    def __init__(self) -> None:
        super().__init__()
        self._is_plain = False

    def _read_outside(self, pieces: list[Piece]) -> bool:
        if self._is_plain:
            if self._held:
                pieces.append(self._held)
            self._held = ""
            return False
        before = _BEFORE_LLAMA_CALL.match(self._held)
        assert before is not None  # it matches nothing as well
        rest = self._held[before.end() :]
        if rest.startswith("{"):
            self._begin_object(before[0])
            self._held = rest
            return True
        if _PYTHON_TAG.startswith(rest) and len(self._held) <= _MAX_HELD:
            return False
        self._is_plain = True
        return True

    def _after_object(self, is_call: bool) -> None:
        self._is_plain = not is_call

    def _rest(self) -> str:
        return "" if self._num_calls and self._held.strip(" \t\r\n;,") == "" else self._held
