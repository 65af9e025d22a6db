"""What a request asks of its output becomes a grammar that llguidance compiles, and that allows just that."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.support import trained_tokenizers as trained
from tprt.errors import InvalidRequestError
from tprt.messages import Grammar
from tprt.server import json_grammar
from tprt.server.invalid_field import InvalidFieldError
from tprt.server.structured_output import OutputRules, check_grammar, grammar_of
from tprt.server.tool_calls import make_tool_call_parser

COMPILERS = {
    "json_schema": LLMatcher.grammar_from_json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"deeper": {"$ref": "#/$defs/node"}},
    "$defs": {"node": {"type": "object", "properties": {"deeper": {"$ref": "#/$defs/node"}}}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "tree", "parameters": TREE}},
    {"type": "function", "function": {"name": "now"}},
]
WEATHER = '{"name": "weather", "arguments": {"city": "Bern"}}'


@cache
def tokenizer(tags: str) -> LLTokenizer:
    """A byte-level one, without and with the tags of tool calls as tokens."""
    fast = trained.byte_level()
    return LLTokenizer((trained.add_tool_call_tags(fast) if tags == "tokens" else fast).to_str())


def allows(grammar: Grammar, text: str, tags: str = "text") -> bool:
    """Whether `text` is a sentence of the grammar."""
    matcher = LLMatcher(tokenizer(tags), COMPILERS[grammar.kind](grammar.source))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer(tags).tokenize_str(text, parse_special=True)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def compiled(**fields: Any) -> Grammar:
    grammar = grammar_of(OutputRules(**fields))
    assert grammar is not None
    check_grammar(grammar)
    return grammar


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_call_style": "hermes"},
        {"tools": TOOLS, "tool_choice": "auto", "tool_call_style": "hermes"},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
)
def test_where_nothing_is_asked_there_is_no_grammar(fields: dict[str, Any]) -> None:
    assert grammar_of(OutputRules(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        ({"guided_choice": ["yes", 'n"\no', "東京🎉"]}, ["yes", 'n"\no', "東京🎉"], ["", "ye", "yesyes", "no"]),
        ({"guided_choice": ["a.c"]}, ["a.c"], ["abc"]),
        ({"guided_regex": r"[0-9]{2,3}"}, ["12", "123"], ["1", "1234", "12a"]),
        ({"guided_grammar": 'start: "a"+ "/"'}, ["aa/"], ["/", "a"]),
        ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1]}'], ["[]", "1", '{"a"}']),
        (
            {"guided_json": CITY},
            ['{"city": "x"}', '{"city":"x"}'],
            ["{}", '{"city": 1}', '{"city": "x", "b": 1}'],
        ),
        ({"structured_outputs": {"json": CITY, "regex": None}}, ['{"city": "x"}'], ["{}"]),
        ({"structured_outputs": {"regex": "[0-9]"}}, ["1"], ["a"]),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["no"], ["yesno"]),
        ({"structured_outputs": {"grammar": 'start: "a"+'}}, ["aa"], ["b"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
        ({"guided_json": json.dumps(CITY)}, ['{\n  "city": "x"\n}'], ["{}"]),
        ({"guided_json": TREE}, ['{"deeper": {"deeper": {}}}'], ['{"deeper": 1}']),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY}}},
            ['{"city": "x"}'],
            ["{}"],
        ),
    ],
)
def test_a_grammar_allows_what_was_asked_for(
    fields: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    grammar = compiled(**fields)
    assert [text for text in allowed if not allows(grammar, text)] == []
    assert [text for text in refused if allows(grammar, text)] == []


def test_json_cannot_be_filled_with_white_space_for_ever() -> None:
    grammar = compiled(response_format={"type": "json_object"})
    indented = json.dumps({"a": {"b": [1, {"c": None}]}}, indent=2)
    assert allows(grammar, indented)
    for gap in ("   ", "\n\n", "\n" + " " * 99):
        assert not allows(grammar, f'{{"a":{gap}1}}')


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in calls)


@pytest.mark.parametrize("tags", ["text", "tokens"])
def test_a_call_that_is_required_is_one_of_the_tools_with_its_arguments(tags: str) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "tool_call_style": "hermes", "tool_tags": tags}
    grammar = compiled(**fields)
    weather, now = call("weather", '{"city": "Bern"}'), call("now", '{"any": 1}')
    tree = call("tree", '{"deeper": {"deeper": {}}}')
    for text in (tagged(weather), tagged(now), tagged(tree), tagged(weather, now)):
        assert allows(grammar, text, tags)
        parser = make_tool_call_parser("hermes")
        pieces = [*parser.feed(text), *parser.finish()]
        assert not any(isinstance(piece, str) for piece in pieces)
    for text in (
        "Hello",
        weather,
        tagged(call("other", "{}")),
        tagged(call("weather", "{}")),
        tagged(call("now", "[]")),
    ):
        assert not allows(grammar, text, tags)
    alone = compiled(**fields, parallel_tool_calls=False)
    assert allows(alone, tagged(weather), tags)
    assert not allows(alone, tagged(weather, now), tags)


def test_tags_as_text_are_not_the_tokens_that_a_model_with_such_tokens_writes() -> None:
    text = tagged(call("now", "{}"))
    fields = {"tools": TOOLS, "tool_choice": "required", "tool_call_style": "hermes"}
    assert not allows(compiled(**fields, tool_tags="text"), text, "tokens")
    assert allows(compiled(**fields, tool_tags="tokens"), text, "tokens")


def test_a_named_function_is_called_once() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    grammar = compiled(tools=TOOLS, tool_choice=choice, tool_call_style="hermes")
    weather = call("weather", '{"city": "Bern"}')
    assert allows(grammar, tagged(weather))
    assert not allows(grammar, tagged(weather, weather))
    assert not allows(grammar, tagged(call("now", "{}")))


def test_a_call_in_the_style_of_llama_is_one_object() -> None:
    grammar = compiled(tools=TOOLS, tool_choice="required", tool_call_style="llama")
    weather = call("weather", '{"city": "Bern"}', "parameters")
    assert allows(grammar, weather)
    assert not allows(grammar, weather + weather)
    parser = make_tool_call_parser("llama")
    assert not any(isinstance(piece, str) for piece in [*parser.feed(weather), *parser.finish()])


def test_a_call_that_must_be_made_comes_before_a_format() -> None:
    grammar = compiled(
        tools=TOOLS, tool_choice="required", tool_call_style="llama", response_format={"type": "json_object"}
    )
    assert grammar.kind == "lark"


NAMED = {"type": "function", "function": {"name": "nobody"}}
DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json is there as well"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "guided_"),
        ({"guided_choice": []}, "guided_choice", "expected 1 to"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice", "5000 choices"),
        ({"guided_json": "{"}, "guided_json", "it is no JSON"),
        ({"guided_json": "[" * 100_000}, "guided_json", "it is no JSON"),
        ({"guided_json": "3"}, "guided_json", "a int; expected a JSON schema"),
        ({"guided_json": DEEP}, "guided_json", "nested more than 64 levels"),
        ({"guided_regex": "a" * 200_000}, "guided_regex", "200000 characters"),
        ({"guided_json": " " * 200_000}, "guided_json", "200000 characters"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'; expected"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice", "no tool calls of a known style"),
        ({"tool_choice": "maybe", "tools": TOOLS}, "tool_choice", "'maybe'; expected"),
        (
            {"tool_choice": NAMED, "tools": TOOLS},
            "tool_choice.function.name",
            "'nobody'; expected one of weather",
        ),
        ({"tool_choice": "required", "tools": [{}]}, "tools[0].function", "an object with a name"),
        ({"tool_choice": "required", "tools": TOOLS * 50}, "tools", "150 of them"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        grammar_of(OutputRules(**fields))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "(a"), "this regular expression cannot be used: .*unclosed group"),
        (Grammar("json_schema", '{"type": "foo"}'), "this JSON schema cannot be used: Invalid type: foo"),
        (Grammar("json_schema", '{"not": {}}'), 'Unimplemented keys: ."not"'),
        (Grammar("lark", "start: nothing"), 'this grammar cannot be used: .*unknown name: "nothing"'),
    ],
)
def test_what_llguidance_cannot_compile_is_refused_in_its_words(grammar: Grammar, words: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=f"(?s){words}"):
            check_grammar(grammar)


def test_all_schemas_of_the_tools_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_grammar, "MAX_SOURCE_CHARACTERS", 500)
    with pytest.raises(InvalidFieldError, match=r"tools: .* characters"):
        grammar_of(OutputRules(tools=TOOLS * 3, tool_choice="required", tool_call_style="hermes"))


def test_rules_nested_as_deep_as_a_grammar_may_be_long_do_not_end_the_process() -> None:
    num_rules = 6500
    rules = "".join(f"r{number}: r{number + 1}\n" for number in range(num_rules))
    check_grammar(Grammar("lark", f'start: r0\n{rules}r{num_rules}: "x"\n'))
