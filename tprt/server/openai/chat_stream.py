"""One choice of a streamed chat answer: from the news of a sequence to the events that tell them.

Knows nothing of how events are sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tprt.server.completion import TokenLogprobs
from tprt.server.openai.chat_tools import ToolUse
from tprt.server.openai.chunk_template import TEXT, ChunkTemplate, StreamExtras
from tprt.server.openai.logprobs import chat_logprobs
from tprt.server.tokenizer import Tokenizer
from tprt.server.tool_calls import Piece, ToolCallDelta

if TYPE_CHECKING:
    from tprt.server.async_engine import Delta

_Usage = Mapping[str, object] | None
_ROLE = {"role": "assistant", "content": "", "refusal": None}


class ChatChoiceStream:
    """Makes the events of one choice."""

    def __init__(
        self,
        head: Mapping[str, object],
        index: int,
        tool_use: ToolUse,
        extras: StreamExtras,
        tokenizer: Tokenizer,
    ) -> None:
        plain = {"delta": {"content": TEXT}, "logprobs": None, "finish_reason": None}
        self._template = ChunkTemplate(head, index, plain, extras.usage_at_end)
        self._extras = extras
        self._tool_use = tool_use
        self._tokenizer = tokenizer
        self._parser = tool_use.make_parser()
        self._is_plain = extras.are_plain and self._parser is None
        self._has_begun = False
        self._has_called = False

    def events(self, delta: Delta, usage: _Usage = None) -> bytes:
        """Return the events that tell of `delta`; none where it has brought nothing to show."""
        if self._is_plain and self._has_begun and delta.finish_reason is None:
            return self._template.text(delta.text) if delta.text else b""
        chunks = []
        if not self._has_begun:
            self._has_begun = True
            more: dict[str, Any] = {}
            if self._extras.token_ids:
                more["prompt_token_ids"] = self._extras.prompt_token_ids
            chunks.append(self._chunk(_ROLE, usage, **more))
        changes = self._changes(delta)
        if not changes and (delta.logprobs or (self._extras.token_ids and delta.token_ids)):
            changes = [{"content": ""}]
        for number, change in enumerate(changes):
            # What belongs to the tokens goes with the first chunk of them.
            chunks.append(self._chunk(change, usage, delta if number == 0 else None))
        if delta.finish_reason is not None:
            finish = self._tool_use.finish_reason(delta.finish_reason, self._has_called)
            chunks.append(self._chunk({}, usage, finish=finish))
        return b"".join(chunks)

    def _changes(self, delta: Delta) -> list[dict[str, Any]]:
        """Return what is new of the message: text, or parts of tool calls."""
        if self._parser is None:
            return [{"content": delta.text}] if delta.text else []
        pieces = self._parser.feed(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces = [*pieces, *self._parser.finish()]
        return [change for piece in pieces if (change := self._change(piece)) is not None]

    def _change(self, piece: Piece) -> dict[str, Any] | None:
        if isinstance(piece, str):
            is_gap = self._has_called and not piece.strip()
            return {"content": piece} if piece and not is_gap else None
        self._has_called = True
        return {"tool_calls": [call_change(piece)]} if self._tool_use.keeps(piece) else None

    def _chunk(
        self,
        change: Mapping[str, Any],
        usage: _Usage,
        delta: Delta | None = None,
        finish: str | None = None,
        **more: object,
    ) -> bytes:
        logprobs = self._logprobs(delta.logprobs) if delta is not None and self._extras.logprobs else None
        choice: dict[str, object] = {"delta": change, "logprobs": logprobs, "finish_reason": finish}
        if self._extras.token_ids:
            choice["token_ids"] = [] if delta is None else delta.token_ids
        return self._template.chunk(choice, usage, **more)

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, object] | None:
        return chat_logprobs(tokens, self._tokenizer) if tokens else None


def call_change(call: ToolCallDelta) -> dict[str, Any]:
    """Return a part of a tool call as OpenAI streams it: id, type and name come once."""
    function: dict[str, str] = {"arguments": call.arguments}
    change: dict[str, Any] = {"index": call.index}
    if call.id is not None:
        change |= {"id": call.id, "type": "function"}
    if call.name is not None:
        function = {"name": call.name, **function}
    return {**change, "function": function}
