"""What a request says about the shape of its output, as one grammar.

OpenAI's `response_format` and `tool_choice`, and vLLM's `structured_outputs` and, as they were called before,
`guided_json`, `guided_regex`, `guided_choice` and `guided_grammar`. llguidance says what it cannot compile
before the engine hears of it. Knows nothing of tokens and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from tprt.deep_stack import call_on_deep_stack
from tprt.errors import InvalidRequestError
from tprt.messages import Grammar
from tprt.server.invalid_field import InvalidFieldError
from tprt.server.json_grammar import bounded_grammar, quoted, schema_source
from tprt.server.tool_calls import ToolCallStyle
from tprt.server.tool_grammar import Function, ToolTags, read_functions, tool_grammar

MAX_CHOICES = 4096
_NUM_CHECKED = 64
_COMPILERS: dict[str, Callable[[str], str]] = {
    "json_schema": LLMatcher.grammar_from_json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}
_KIND_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """The fields of a request that say what its output looks like, as they came.

    Attributes:
        response_format: `{"type": "text" | "json_object"}` or `{"type": "json_schema", "json_schema": {...}}`.
        guided_json: a JSON schema, as an object or as its text.
        guided_regex, guided_choice, guided_grammar: a regular expression, one of some texts, a Lark grammar.
        structured_outputs: one of these as `json`, `regex`, `choice` or `grammar`, or true as `json_object`.
        tools: OpenAI's tool objects.
        tool_choice: "none", "auto", "required", or `{"type": "function", "function": {"name": ...}}`.
        parallel_tool_calls: there may be several calls.
        tool_call_style, tool_tags: how the model writes them; see `Tokenizer`.
    """

    response_format: Mapping[str, Any] | None = None
    guided_json: str | Mapping[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Sequence[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    tool_call_style: ToolCallStyle | None = None
    tool_tags: ToolTags = "text"


def grammar_of(rules: OutputRules) -> Grammar | None:
    """Return the grammar that an output must keep to; None where anything goes.

    A tool call that must be made comes before a format, which is for answers in words. Nothing is compiled yet;
    see `check_grammar`.

    Raises:
        InvalidFieldError: a field is not as it should be, too large, or contradicts another.
    """
    guided = _guided(rules)
    formatted = _formatted(rules.response_format)
    if guided is not None and formatted is not None:
        problem = "a guided_* field or structured_outputs is there as well; expected one of them"
        raise InvalidFieldError("response_format", problem)
    functions = _functions_to_call(rules)
    if not functions:
        return guided or formatted
    if rules.tool_call_style is None:
        problem = 'this model\'s chat template has no tool calls of a known style; expected "auto" or "none"'
        raise InvalidFieldError("tool_choice", problem)
    several = rules.parallel_tool_calls and rules.tool_choice == "required"
    return tool_grammar(functions, rules.tool_call_style, rules.tool_tags, several=several)


def check_grammar(grammar: Grammar) -> None:
    """Let llguidance compile `grammar`; this may take a few tenths of a second.

    Raises:
        InvalidRequestError: it cannot, for the reason that it gives.
    """
    complaint = _complaint(grammar)
    if complaint:
        raise InvalidRequestError(f"this {_KIND_NAMES[grammar.kind]} cannot be used: {complaint}")


@lru_cache(_NUM_CHECKED)
def _complaint(grammar: Grammar) -> str:
    """Return what llguidance has against `grammar`, empty if nothing; it recurses as deep as rules nest."""
    return call_on_deep_stack(lambda: _complaint_here(grammar))


def _complaint_here(grammar: Grammar) -> str:
    try:
        source = _COMPILERS[grammar.kind](grammar.source)
    except ValueError as error:
        return str(error)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(source)
    return messages[0].strip() if is_error else ""


def _guided(rules: OutputRules) -> Grammar | None:
    asked = {name: getattr(rules, name) for name in _GUIDED}
    named = {f"structured_outputs.{kind}": value for kind, value in (rules.structured_outputs or {}).items()}
    given = {
        field: value for field, value in (asked | named).items() if value is not None and value is not False
    }
    if rules.structured_outputs is not None and not any(field in given for field in named):
        problem = "none of json, regex, choice, grammar and json_object is there; expected one of them"
        raise InvalidFieldError("structured_outputs", problem)
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidFieldError(second, f"{first} is there as well; expected one of them")
    return next((_guided_by(field, value) for field, value in given.items()), None)


def _guided_by(field: str, value: Any) -> Grammar:
    if field.endswith("json_object"):
        return _json_grammar(field, {"type": "object"})
    if field.endswith("json"):
        return _json_grammar(field, value)
    if field.endswith("choice"):
        return _choice_grammar(field, value)
    return bounded_grammar(field, "regex" if field.endswith("regex") else "lark", value)


def _formatted(response_format: Mapping[str, Any] | None) -> Grammar | None:
    if response_format is None or response_format.get("type") == "text":
        return None
    kind = response_format.get("type")
    if kind == "json_object":
        return _json_grammar("response_format", {"type": "object"})
    if kind != "json_schema":
        expected = "'text', 'json_object' or 'json_schema'"
        raise InvalidFieldError("response_format.type", f"{kind!r}; expected {expected}")
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if schema is None:
        raise InvalidFieldError("response_format.json_schema.schema", "missing; expected a JSON schema")
    return _json_grammar("response_format.json_schema.schema", schema)


def _json_grammar(field: str, schema: object) -> Grammar:
    return bounded_grammar(field, "json_schema", schema_source(field, schema))


def _choice_grammar(field: str, choices: Sequence[str]) -> Grammar:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidFieldError(field, f"{len(choices)} choices; expected 1 to {MAX_CHOICES}")
    source = "start: " + " | ".join(quoted(choice) for choice in choices)
    return bounded_grammar(field, "lark", source)


def _functions_to_call(rules: OutputRules) -> list[Function]:
    """Return the functions of which one must be called; none where none must."""
    choice = rules.tool_choice
    if choice is None or choice in ("none", "auto"):
        return []
    functions = read_functions(rules.tools or ())
    if not functions:
        raise InvalidFieldError("tool_choice", "there are no tools; expected some in 'tools'")
    if choice == "required":
        return functions
    named = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(named, Mapping):
        problem = f"{choice!r}; expected 'none', 'auto', 'required' or a function by its name"
        raise InvalidFieldError("tool_choice", problem)
    chosen = [function for function in functions if function.name == named.get("name")]
    if not chosen:
        names = ", ".join(function.name for function in functions)
        raise InvalidFieldError("tool_choice.function.name", f"{named.get('name')!r}; expected one of {names}")
    return chosen[:1]
