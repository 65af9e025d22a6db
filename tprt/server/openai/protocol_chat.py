"""The request for a chat answer: messages and tools.

Knows nothing of templates and of how a model writes a tool call.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tprt.server.openai.protocol_common import NumTopLogprobs, ProtocolModel, SamplingFields

FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class ContentPart(ProtocolModel):
    """A part of a message."""

    type: str
    """text; all others are refused."""
    text: str | None = None
    """The text."""


class FunctionCall(ProtocolModel):
    """What a tool was called with."""

    name: FunctionName
    arguments: str = ""
    """A JSON object, as text."""


class ToolCall(ProtocolModel):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ProtocolModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """developer is read as system."""
    content: str | list[ContentPart] | None = None
    """Text, or parts of text; an assistant's message that calls tools may have none."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """For an assistant's message."""
    tool_call_id: str | None = None
    """For a tool's message: the call that it answers."""
    reasoning_content: str | None = None
    """For an assistant's message: what it thought, for templates that repeat that."""


class FunctionDefinition(ProtocolModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments."""
    strict: bool | None = None


class Tool(ProtocolModel):
    """Something that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(ProtocolModel):
    """The name of a function."""

    name: FunctionName


class NamedToolChoice(ProtocolModel):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate; none: what the context leaves."""
    logprobs: bool | None = None
    """Report the log-probability of each token."""
    top_logprobs: NumTopLogprobs | None = None
    """Report so many of the most likely tokens at each place; only with logprobs."""
    tools: list[Tool] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    """Whether, and which; auto when there are tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call in an answer."""
    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of the assistant's answer; true when left out."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Passed on to the model's chat template."""
    functions: list[Any] | None = None
    """Refused; use tools."""
    echo: bool | None = None
    """Refused; completions have it."""
