"""Tools reach the template, and calls come back in OpenAI's form, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer

from tests.support.fake_server import END, FakeServer, fake_server, save_byte_tokenizer
from tests.support.sse import chat_text, chunks_of, finish_reasons
from tprt.server.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def says(server: FakeServer, text: str) -> FakeServer:
    server.engine.answer = lambda prompt, sampling: text + END
    return server


def streamed_calls(chunks: list[dict[str, Any]]) -> dict[int, dict[str, str]]:
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for change in chunk["choices"][0]["delta"].get("tool_calls", ()):
            call = calls.setdefault(change["index"], {"name": "", "arguments": ""})
            call["name"] += change["function"].get("name", "")
            call["arguments"] += change["function"]["arguments"]
            if "id" in change:
                assert "id" not in call
                call["id"] = change["id"]
                assert change["type"] == "function"
    return calls


def test_a_call_is_taken_out_of_the_text(tool_server: FakeServer) -> None:
    choice = says(tool_server, CALL).chat(tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert call["id"]


def test_a_streamed_call_is_the_same(tool_server: FakeServer) -> None:
    chunks = chunks_of(says(tool_server, "Wait. " + CALL).chat(tools=[WEATHER], stream=True).text)
    (call,) = streamed_calls(chunks).values()
    assert call["name"] == "weather"
    assert json.loads(call["arguments"]) == {"city": "Rome"}
    assert call["id"]
    assert chat_text(chunks).strip() == "Wait."
    assert finish_reasons(chunks) == ["tool_calls"]


def test_a_call_is_found_where_its_tags_are_special_tokens(tmp_path: Path) -> None:
    file = save_byte_tokenizer(tmp_path, with_tools=True) / "tokenizer.json"
    fast = FastTokenizer.from_file(str(file))
    fast.add_special_tokens(["<tool_call>", "</tool_call>"])
    fast.save(str(file))
    with fake_server(Tokenizer(str(tmp_path))) as server:
        choice = says(server, CALL).chat(tools=[WEATHER]).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
        chunks = chunks_of(says(server, CALL).chat(tools=[WEATHER], stream=True).text)
        assert [call["name"] for call in streamed_calls(chunks).values()] == ["weather"]


def test_an_answer_without_a_call_is_plain_text(tool_server: FakeServer) -> None:
    says(tool_server, "No < call.")
    choice = tool_server.chat(tools=[WEATHER]).json()["choices"][0]
    assert choice["message"]["content"] == "No < call."
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]
    assert chat_text(chunks_of(tool_server.chat(tools=[WEATHER], stream=True).text)) == "No < call."


def test_several_calls_come_unless_they_are_not_wanted(tool_server: FakeServer) -> None:
    says(tool_server, CALL + "\n" + CALL)
    for wanted, count in ((True, 2), (False, 1)):
        fields = {"tools": [WEATHER], "parallel_tool_calls": wanted}
        message = tool_server.chat(**fields).json()["choices"][0]["message"]
        assert len(message["tool_calls"]) == count
        chunks = chunks_of(tool_server.chat(**fields, stream=True).text)
        assert len(streamed_calls(chunks)) == count
        assert chat_text(chunks) == ""


def test_tools_are_not_mentioned_where_the_choice_is_none(tool_server: FakeServer) -> None:
    message = says(tool_server, CALL).chat(tools=[WEATHER], tool_choice="none").json()["choices"][0]["message"]
    assert message["content"] == CALL
    plain = len(tool_server.engine.submitted[0][0])
    tool_server.chat(tools=[WEATHER])
    assert len(tool_server.engine.submitted[1][0]) > plain


def test_a_required_call_is_a_grammar(tool_server: FakeServer) -> None:
    says(tool_server, CALL)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        answer = tool_server.chat(tools=[WEATHER], tool_choice=choice).json()["choices"][0]
        assert answer["finish_reason"] == reason
        assert len(answer["message"]["tool_calls"]) == 1
    assert [sampling.grammar is not None for _, sampling, _ in tool_server.engine.submitted] == [True, True]


def test_earlier_calls_and_their_results_reach_the_template(
    tool_server: FakeServer, tool_tokenizer: Tokenizer
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
    ]
    response = tool_server.client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200
    text = tool_tokenizer.decode(tool_server.engine.submitted[0][0])
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert "tool\nSunny" in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ],
)
def test_tools_that_cannot_be_had_are_refused(tool_server: FakeServer, fields: dict, param: str) -> None:
    response = tool_server.chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_model_without_tools_says_so(server: FakeServer) -> None:
    assert "no tools" in server.chat(tools=[WEATHER]).json()["error"]["message"]
