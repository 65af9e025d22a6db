"""From texts and messages to the token ids of prompts.

Long ones are encoded in a thread, so that streams go on meanwhile. Knows nothing of sampling.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tprt.server.http.errors import invalid
from tprt.server.openai.protocol_chat import ChatMessage
from tprt.server.tokenizer import Tokenizer

T = TypeVar("T")

# A text of this many characters takes a few milliseconds.
_LONG = 8192
_RESERVED = frozenset({"self", "messages", "tools"})


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer.

    Raises:
        ApiError: there is none.
    """
    if tokenizer is None:
        raise invalid("this model has no tokenizer; send prompts as token ids to /v1/completions")
    return tokenizer


async def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the token ids of texts."""

    def encode() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    return await off_loop(sum(map(len, texts)), encode)


async def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, object] | None = None,
) -> list[int]:
    """Return the token ids of a conversation; `arguments` are further variables of the template.

    Raises:
        ApiError, InvalidRequestError: a message, or an argument of the template, cannot be had.
    """
    arguments = dict(arguments or {})
    if wrong := _RESERVED.intersection(arguments):
        raise invalid(f"chat_template_kwargs may not set {sorted(wrong)}", "chat_template_kwargs")
    plain = [_template_message(message, number) for number, message in enumerate(messages)]
    length = sum(_length(message) for message in messages) + (len(json.dumps(tools)) if tools else 0)
    return await off_loop(length, lambda: tokenizer.encode_chat(plain, tools or None, **arguments))


def template_arguments(
    given: Mapping[str, object] | None, add_generation_prompt: bool | None
) -> dict[str, object]:
    """Return further variables of a template: what is `given`, and the field that has a name of its own."""
    named = {} if add_generation_prompt is None else {"add_generation_prompt": add_generation_prompt}
    return named | dict(given or {})


async def off_loop(length: int, work: Callable[[], T]) -> T:
    """Do work on a text of `length` characters (or as many tokens), in a thread if that takes long."""
    return await asyncio.to_thread(work) if length > _LONG else work()


def _length(message: ChatMessage) -> int:
    content = message.content
    if isinstance(content, list):
        return sum(len(part.text or "") for part in content)
    return len(content or "")


def _template_message(message: ChatMessage, number: int) -> dict[str, Any]:
    """Return a message as templates know it; they know no developer."""
    plain = message.model_dump(exclude_none=True)
    if message.role == "developer":
        plain["role"] = "system"
    if message.content is None and not message.tool_calls:
        if message.role != "assistant":
            raise invalid(f"messages[{number}] has no content", f"messages[{number}].content")
        plain["content"] = ""
    for call in message.tool_calls or ():
        _check_arguments(call.function.arguments, number)
    return plain


def _check_arguments(arguments: str, number: int) -> None:
    """Refuse half of a surrogate pair, which an escape within the text can hide, and no tokenizer can read."""
    if "\\u" not in arguments:
        return
    try:
        json.dumps(json.loads(arguments), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        place = f"messages[{number}].tool_calls"
        raise invalid(f"{place} has arguments with half of a surrogate pair", place) from None
    except (ValueError, RecursionError):
        return
