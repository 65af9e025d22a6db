"""The grammar that a request wants its output to keep to, compiled once to know that it can be.

Knows nothing of what a grammar is.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from tprt.messages import Grammar
from tprt.server.openai.chat_tools import ToolUse
from tprt.server.openai.protocol_chat import ChatCompletionRequest, NamedToolChoice
from tprt.server.openai.protocol_common import SamplingFields
from tprt.server.openai.protocol_completion import CompletionRequest
from tprt.server.structured_output import OutputRules, check_grammar, grammar_of
from tprt.server.tokenizer import Tokenizer


async def completion_grammar(body: CompletionRequest) -> Grammar | None:
    """Return the grammar of a completion, if there is one.

    Raises:
        InvalidRequestError: the fields contradict each other, or the grammar cannot be compiled.
    """
    return await _checked(_rules(body))


async def chat_grammar(body: ChatCompletionRequest, tool_use: ToolUse, tokenizer: Tokenizer) -> Grammar | None:
    """Return the grammar of a chat answer, that of the tool call that it must make among them.

    Raises:
        InvalidRequestError: the fields contradict each other, or the grammar cannot be compiled.
    """
    rules = replace(
        _rules(body),
        tools=tool_use.tools,
        tool_choice=_plain_choice(body),
        parallel_tool_calls=not tool_use.at_most_one,
        tool_call_style=tool_use.style,
        tool_tags=tokenizer.tool_tags,
    )
    return await _checked(rules)


async def _checked(rules: OutputRules) -> Grammar | None:
    grammar = grammar_of(rules)
    if grammar is not None:
        # A large one takes tenths of a second, in which streams go on.
        await asyncio.to_thread(check_grammar, grammar)
    return grammar


def _rules(body: SamplingFields) -> OutputRules:
    shape, structured = body.response_format, body.structured_outputs
    return OutputRules(
        response_format=None if shape is None else shape.model_dump(by_alias=True, exclude_none=True),
        guided_json=body.guided_json,
        guided_regex=body.guided_regex,
        guided_choice=body.guided_choice,
        guided_grammar=body.guided_grammar,
        structured_outputs=None if structured is None else structured.model_dump(by_alias=True),
    )


def _plain_choice(body: ChatCompletionRequest) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    return choice.model_dump() if isinstance(choice, NamedToolChoice) else choice
