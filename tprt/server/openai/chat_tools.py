"""What a chat request says of tools, checked, and the finish reasons that follow.

Knows nothing of how a model writes a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tprt.server.completion import FinishName
from tprt.server.http.errors import ApiError, invalid
from tprt.server.openai.generation import finish_name
from tprt.server.openai.protocol_chat import ChatCompletionRequest, NamedToolChoice, Tool
from tprt.server.tool_calls import ToolCallDelta, ToolCallParser, ToolCallStyle, make_tool_call_parser


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Whether and how an answer may call tools.

    Attributes:
        tools: what the template describes to the model.
        style: how the model writes calls; None where none are looked for.
        at_most_one: drop all calls of an answer but the first.
        is_named: the request says which function is called.
    """

    tools: tuple[dict[str, Any], ...] = ()
    style: ToolCallStyle | None = None
    at_most_one: bool = False
    is_named: bool = False

    def make_parser(self) -> ToolCallParser | None:
        """Return what finds the calls of one output."""
        return None if self.style is None else make_tool_call_parser(self.style)

    def keeps(self, call: ToolCallDelta) -> bool:
        """Tell whether a call is passed on."""
        return call.index == 0 or not self.at_most_one

    def finish_reason(self, reason: FinishName, has_called: bool) -> str:
        """Return why an output has ended; a call is no reason of its own where the request names it."""
        if reason == "stop" and has_called and not self.is_named:
            return "tool_calls"
        return finish_name(reason)


def tool_use_of(request: ChatCompletionRequest, style: ToolCallStyle | None) -> ToolUse:
    """Return what the request says of tools; `style` is that of the model.

    Raises:
        ApiError: tools are asked for that there are not, or that this model cannot call.
    """
    if request.functions:
        raise invalid("'functions' is not supported; use 'tools'", "functions")
    choice, tools = request.tool_choice, request.tools or []
    if choice == "none" or not (tools or choice):
        return ToolUse()
    if not tools:
        raise invalid("'tool_choice' is only allowed when 'tools' are given", "tool_choice")
    if style is None:
        raise invalid("this model's chat template has no tools, so it cannot call any", "tools")
    if isinstance(choice, NamedToolChoice):
        _check_name(choice, tools)
    return ToolUse(
        tuple(tool.model_dump(exclude_none=True) for tool in tools),
        style,
        request.parallel_tool_calls is False,
        isinstance(choice, NamedToolChoice),
    )


def _check_name(choice: NamedToolChoice, tools: list[Tool]) -> None:
    if all(tool.function.name != choice.function.name for tool in tools):
        raise _unknown(choice.function.name)


def _unknown(name: str) -> ApiError:
    return invalid(
        f"'tool_choice' names the function {name[:64]!r}, which is not among the tools", "tool_choice"
    )
