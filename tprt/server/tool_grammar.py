"""Grammars of outputs that are tool calls, in the styles that `tprt.server.tool_calls` reads.

The names are those of the tools, the arguments follow their schemas, and what is around them is written as chat
templates write it. Knows nothing of when a call must be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tprt.messages import Grammar
from tprt.server.invalid_field import InvalidFieldError
from tprt.server.json_grammar import bounded_grammar, quoted, schema_source
from tprt.server.tool_calls import ToolCallStyle

MAX_TOOLS = 128
# Whether the tokenizer has `<tool_call>` and `</tool_call>` as one token each. A model that has them uses them,
# and a grammar must then name the tokens, since text in a grammar is never one of them.
ToolTags = Literal["text", "tokens"]


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that may be called: its name, the JSON schema of its arguments, and the field where it stands."""

    name: str
    parameters: Mapping[str, Any]
    field: str


def read_functions(tools: Sequence[Mapping[str, Any]]) -> list[Function]:
    """Return the functions of OpenAI's tool objects.

    Raises:
        InvalidFieldError: there are too many, or one is not as it should be.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidFieldError("tools", f"{len(tools)} of them; expected {MAX_TOOLS} at most")
    return [_read_function(tool, f"tools[{number}].function") for number, tool in enumerate(tools)]


def tool_grammar(
    functions: Sequence[Function], style: ToolCallStyle, tags: ToolTags, *, several: bool
) -> Grammar:
    """Return the grammar of a call of one of `functions`; `several`: or of more of them, where the style can.

    Raises:
        InvalidFieldError: a schema is too large, or all together are.
    """
    key = "arguments" if style == "hermes" else "parameters"
    rules = [_start(style, tags, several)]
    rules.append("object: " + " | ".join(f"object_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        before = f'{{"name": {quoted(function.name)}, "{key}": '
        source = schema_source(f"{function.field}.parameters", {"type": "object", **function.parameters})
        rules.append(f'object_{i}: {quoted(before)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {source}")
    return bounded_grammar("tools", "lark", "\n".join(rules))


def _start(style: ToolCallStyle, tags: ToolTags, several: bool) -> str:
    if style == "llama":
        return "start: object"
    is_token = tags == "tokens"
    begin = '<tool_call> "\\n"' if is_token else quoted("<tool_call>\n")
    end = '"\\n" </tool_call>' if is_token else quoted("\n</tool_call>")
    more = ' ("\\n" call)*' if several else ""
    return f"start: call{more}\ncall: {begin} object {end}"


def _read_function(tool: Mapping[str, Any], field: str) -> Function:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InvalidFieldError(field, "expected an object with a name")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InvalidFieldError(f"{field}.parameters", "expected a JSON schema, which is an object")
    return Function(name, parameters, field)
