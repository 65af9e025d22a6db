"""Chat messages to prompts, by the template of a checkpoint.

Messages and tools come as OpenAI's API has them and are handed on as templates expect them: content is text,
and the arguments of earlier tool calls are objects rather than JSON text. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tprt.errors import InvalidRequestError
from tprt.server.template_sandbox import SandboxedTemplate
from tprt.server.tool_calls import ToolCallStyle

Message = Mapping[str, Any]

# Styles that use the tags of Hermes for something that is not its JSON.
_NOT_HERMES = ("<function=", "<arg_key>")

# What templates write where they put an earlier call into the prompt.
_LLAMA = ("tool_calls", '{"name": "', '"parameters": ')


class ChatTemplate:
    """The template of one checkpoint, and the one for tools where there are two."""

    def __init__(self, source: str, tools_source: str | None, special_tokens: Mapping[str, str]) -> None:
        """Take the templates, and `bos_token` and its like by name."""
        self._source = source
        self._tools_source = tools_source or source
        self._special_tokens = dict(special_tokens)

    @property
    def tool_call_style(self) -> ToolCallStyle | None:
        """How the model is told to write tool calls; None: not at all, or in a way that is not known here."""
        source = self._tools_source
        if "<tool_call>" in source:
            return None if any(mark in source for mark in _NOT_HERMES) else "hermes"
        return "llama" if all(mark in source for mark in _LLAMA) else None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt for `messages`; `arguments` are further variables of the template.

        Raises:
            InvalidRequestError: the template refuses the messages or does not end, or a message is not text.
        """
        template = self._with_tools if tools else self._without_tools
        variables = {
            "add_generation_prompt": True,
            "documents": None,
            **self._special_tokens,
            **(arguments or {}),
            "tools": list(tools) if tools else None,
        }
        plain = [_plain(message, number) for number, message in enumerate(messages)]
        parsed = [_with_argument_objects(message) for message in plain]
        try:
            return template.render({**variables, "messages": parsed})
        except InvalidRequestError as error:
            # A few templates put the arguments together from text themselves.
            if parsed == plain or not isinstance(error.__cause__, TypeError):
                raise
        return template.render({**variables, "messages": plain})

    @cached_property
    def _without_tools(self) -> SandboxedTemplate:
        return SandboxedTemplate(self._source)

    @cached_property
    def _with_tools(self) -> SandboxedTemplate:
        return SandboxedTemplate(self._tools_source)


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """Return the template in chat_template.jinja or, from tokenizer_config.json, in `settings`."""
    file = folder / "chat_template.jinja"
    value = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    named: dict[Any, Any] = {"default": value}
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
    source, tools_source = named.get("default"), named.get("tool_use")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, tools_source, _special_tokens(settings))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and its like as text; a settings file holds text or an object with `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _plain(message: Message, number: int) -> dict[str, Any]:
    """Return the message with its content as text: parts are lines, and no content is empty text."""
    content = message.get("content")
    if content is None:
        content = ""
    elif not isinstance(content, str):
        content = "\n".join(_part_text(part, number) for part in content)
    return {**message, "content": content}


def _part_text(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InvalidRequestError(f"messages[{number}].content has a part of type {kind!r}; expected 'text'")
    return text


def _with_argument_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Parse the arguments of tool calls; text that is no JSON object, as models may write it, stays."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_argument_object(call) for call in calls]}


def _with_argument_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
