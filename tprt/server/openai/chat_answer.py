"""The whole answer to a chat request that does not stream.

Knows nothing of how it came to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tprt.server.openai.chat_tools import ToolUse
from tprt.server.openai.generation import Output
from tprt.server.openai.logprobs import chat_logprobs
from tprt.server.tokenizer import Tokenizer
from tprt.server.tool_calls import Piece


def chat_choice(
    index: int, output: Output, tool_use: ToolUse, tokenizer: Tokenizer, with_logprobs: bool
) -> dict[str, object]:
    """Return one choice: its message, log-probabilities and finish reason."""
    text, calls = _parse(output.text, tool_use)
    message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(output.logprobs, tokenizer) if with_logprobs else None,
        "finish_reason": tool_use.finish_reason(output.finish_reason, bool(calls)),
    }


def _parse(text: str, tool_use: ToolUse) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the plain text of an output, None where it only calls tools, and the calls."""
    parser = tool_use.make_parser()
    if parser is None:
        return text, []
    plain, calls = _sorted([*parser.feed(text), *parser.finish()], tool_use)
    return (plain if plain.strip() or not calls else None), calls


def _sorted(pieces: Iterable[Piece], tool_use: ToolUse) -> tuple[str, list[dict[str, Any]]]:
    plain = ""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, str):
            plain += piece
        elif tool_use.keeps(piece):
            call = calls.setdefault(
                piece.index, {"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["function"]["name"] += piece.name or ""
            call["function"]["arguments"] += piece.arguments
    return plain, [calls[index] for index in sorted(calls)]
