"""Tool calls are found while they are written, and what is none stays as it was."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.server.tool_calls import Piece, ToolCallDelta, ToolCallStyle, make_tool_call_parser

Call = tuple[str, str]
F = '{"name": "f", "arguments": {"a": "x}\\"<", "b": [1, {}]}}'
F_ARGUMENTS = '{"a": "x}\\"<", "b": [1, {}]}'


def parse(style: ToolCallStyle, parts: list[str]) -> list[Piece]:
    parser = make_tool_call_parser(style)
    return [piece for part in parts for piece in parser.feed(part)] + parser.finish()


def read(pieces: list[Piece]) -> tuple[str, list[Call]]:
    """The plain text and the calls (name, arguments); checks that deltas are as OpenAI's clients expect."""
    calls: list[list[str]] = []
    ids = []
    for delta in pieces:
        if isinstance(delta, str):
            assert delta, "a piece of no text says nothing"
        elif delta.index == len(calls):
            assert delta.id is not None
            assert delta.name is not None
            ids.append(delta.id)
            calls.append([delta.name, delta.arguments])
        else:
            assert (delta.index, delta.id, delta.name) == (len(calls) - 1, None, None)
            assert delta.arguments
            calls[-1][1] += delta.arguments
    assert len(set(ids)) == len(ids)
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [(name, arguments) for name, arguments in calls]


HERMES: list[tuple[str, str, list[Call]]] = [
    ("Plain <b>text</b> only.", "Plain <b>text</b> only.", []),
    (f"<tool_call>\n{F}\n</tool_call>", "", [("f", F_ARGUMENTS)]),
    (f"I look.\n\n<tool_call>\n{F}\n</tool_call>", "I look.", [("f", F_ARGUMENTS)]),
    (f"<tool_call>{F}</tool_call>\n<tool_call>{F}</tool_call>\n", "", [("f", F_ARGUMENTS)] * 2),
    (f"<tool_call>{F}</tool_call> Done.", " Done.", [("f", F_ARGUMENTS)]),
    ('<tool_call>{"arguments": {"a": 1}, "id": 3, "name": "g"}</tool_call>', "", [("g", '{"a": 1}')]),
    ('<tool_call>{"type":"function","name":"g","parameters":{}}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"name": "g\\u00fc", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("gü", '{"a": 1}')]),
    # What models get wrong and can still be read.
    (f"<tool_call>{F}", "", [("f", F_ARGUMENTS)]),
    (f"<tool_call>{F}}}</tool_call>", "", [("f", F_ARGUMENTS)]),
    (f"<tool_call>{F[:-1]}</tool_call>", "", [("f", F_ARGUMENTS)]),
    (f"<tool_call>{F}<tool_call>{F}", "", [("f", F_ARGUMENTS)] * 2),
    ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "", [("f", '{"a": 1')]),
    ('<tool_call>{"name": "f", "arguments": {}, "arguments": {}}', '": {}}', [("f", "{}")]),
    # What is no call.
    ("  <tool_call>no</tool_call> x", "  <tool_call>no</tool_call> x", []),
    (
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        [],
    ),
    ('<tool_call>{"name": "f", "other": {}}', '<tool_call>{"name": "f", "other": {}}', []),
    ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ('<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
    ('<tool_call>{"name": "\\x", "arguments": {}}', '<tool_call>{"name": "\\x", "arguments": {}}', []),
    ('<tool_call>{"name": "\\ud800", "arguments": {}}', '<tool_call>{"name": "\\ud800", "arguments": {}}', []),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ("a <tool_cal", "a <tool_cal", []),
    ("a \n ", "a \n ", []),
    (f"<tool_call><tool_call>{F}</tool_call>", "<tool_call>", [("f", F_ARGUMENTS)]),
]
LLAMA: list[tuple[str, str, list[Call]]] = [
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ('\n<|python_tag|>{"name": "f", "parameters": {"a": null}}', "", [("f", '{"a": null}')]),
    ('{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}};', "", [("f", "{}"), ("g", "{}")]),
    ('{"name": "f", "parameters": {}} and more', " and more", [("f", "{}")]),
    ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ('Look: {"name": "f", "parameters": {}}', 'Look: {"name": "f", "parameters": {}}', []),
    ('<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
    ("<|python", "<|python", []),
    ("\n", "\n", []),
]
CASES = [("hermes", *case) for case in HERMES] + [("llama", *case) for case in LLAMA]


@pytest.mark.parametrize(("style", "output", "text", "calls"), CASES)
def test_text_and_calls_are_told_apart_however_the_output_is_cut(
    style: ToolCallStyle, output: str, text: str, calls: list[Call]
) -> None:
    for size in (1, 2, 3, 7, 1000):
        parts = [output[at : at + size] for at in range(0, len(output), size)]
        assert read(parse(style, parts)) == (text, calls)


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(["hermes", "llama"]), st.data())
def test_nothing_that_a_model_writes_is_an_error_or_lost(style: ToolCallStyle, data: st.DataObject) -> None:
    bits = ["<tool_call>", "</tool_call>", "<|python_tag|>", '"name"', '"arguments"', '"x"', *'{}[]:, \n\\"<a1']
    output = "".join(data.draw(st.lists(st.sampled_from(bits), max_size=25)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=6)))
    parts = [output[a:b] for a, b in pairwise([0, *cuts, len(output)])]
    text, calls = read(parse(style, parts))
    if not calls:
        assert text == output
    assert (text, calls) == read(parse(style, [output]))


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.lists(st.none()), max_size=3)
)
def test_arguments_come_as_they_are_written(arguments: dict[str, object]) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    output = f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'
    assert read(parse("hermes", list(output))) == ("", [("f", written)])


def test_the_name_comes_when_the_arguments_begin_and_they_come_as_they_grow() -> None:
    parser = make_tool_call_parser("hermes")
    assert parser.feed('Hm. <tool_call>{"name": "f", "argu') == ["Hm."]
    first = parser.feed('ments": {"a')
    assert [(d.index, d.name, d.arguments) for d in first if isinstance(d, ToolCallDelta)] == [(0, "f", '{"a')]
    assert parser.feed('": 1') == [ToolCallDelta(0, None, None, '": 1')]
    assert parser.feed("}}</tool_") == [ToolCallDelta(0, None, None, "}")]
    assert parser.feed("call>") == parser.finish() == []


def test_plain_text_is_held_back_only_where_a_tag_may_begin() -> None:
    parser = make_tool_call_parser("hermes")
    assert [parser.feed(text) for text in ("a <b", "<to", "ast>", " ", "c")] == [
        ["a <b"],
        [],
        ["<toast>"],
        [],
        [" c"],
    ]
    plain = make_tool_call_parser("llama")
    assert [plain.feed(text) for text in (" ", "a", "{", " ")] == [[], [" a"], ["{"], [" "]]


def test_white_space_without_end_is_passed_on() -> None:
    for style in ("hermes", "llama"):
        parser = make_tool_call_parser(style)
        came = [piece for _ in range(500) for piece in parser.feed("\n")]
        assert sum(map(len, map(str, came))) > 400
