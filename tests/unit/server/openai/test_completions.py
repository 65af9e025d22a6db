"""Completions have OpenAI's form, whole and streamed, for all four kinds of prompts."""

from __future__ import annotations

import pytest

from tests.support.fake_server import END, MAX_MODEL_LEN, FakeServer, fake_server
from tests.support.sse import chunks_of
from tprt.server.tokenizer import Tokenizer


def texts(chunks: list[dict], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


@pytest.fixture
def echoing(server: FakeServer, byte_tokenizer: Tokenizer) -> FakeServer:
    """A server whose outputs repeat their prompt."""
    server.engine.answer = lambda prompt, sampling: f"<{byte_tokenizer.decode(prompt)}>" + END
    return server


def test_a_whole_answer_has_openais_fields(server: FakeServer) -> None:
    answer = server.complete(prompt="Go on", max_tokens=40).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"text": "An answer: 42 ✓.", "index": 0, "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["prompt_tokens"] == len("Go on")


def test_sixteen_tokens_are_made_where_nothing_is_said(server: FakeServer) -> None:
    server.engine.answer = lambda prompt, sampling: "x" * 100
    answer = server.complete(prompt="Go on").json()
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_context_bounds_the_default(server: FakeServer) -> None:
    server.complete(prompt="x" * (MAX_MODEL_LEN - 3))
    assert server.engine.submitted[0][1].max_tokens == 3


def test_prompts_come_as_text_or_ids_alone_or_in_lists(echoing: FakeServer, byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("ab")
    for prompt in ("ab", ["ab"], ids, [ids]):
        answer = echoing.complete(prompt=prompt).json()
        assert [choice["text"] for choice in answer["choices"]] == ["<ab>"]
    for prompt in (["ab", "ab"], [ids, ids]):
        assert len(echoing.complete(prompt=prompt).json()["choices"]) == 2


def test_choices_of_several_prompts_stand_in_their_order(echoing: FakeServer) -> None:
    answer = echoing.complete(prompt=["a", "b"], n=2, best_of=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["<a>", "<a>", "<b>", "<b>"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2
    chunks = chunks_of(echoing.complete(prompt=["a", "b"], n=2, stream=True).text)
    assert [texts(chunks, index) for index in range(4)] == ["<a>", "<a>", "<b>", "<b>"]


def test_a_stream_says_the_same_as_a_whole_answer(server: FakeServer) -> None:
    fields = {"prompt": "Go on", "max_tokens": 40, "logprobs": 2}
    whole = server.complete(**fields).json()
    *chunks, last = chunks_of(
        server.complete(**fields, stream=True, stream_options={"include_usage": True}).text
    )
    assert texts(chunks) == whole["choices"][0]["text"]
    assert last["usage"] == whole["usage"]
    for name, values in whole["choices"][0]["logprobs"].items():
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [value for part in parts if part for value in part[name]] == values


def test_the_first_chunk_of_each_choice_has_the_ids_of_its_prompt(echoing: FakeServer) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "return_token_ids": True}
    whole = [choice["prompt_token_ids"] for choice in echoing.complete(**fields).json()["choices"]]
    chunks = chunks_of(echoing.complete(**fields, stream=True).text)
    for index, prompt in enumerate(whole):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [part.get("prompt_token_ids") for part in parts] == [prompt, *[None] * (len(parts) - 1)]


def test_echo_puts_the_prompt_before_the_output(echoing: FakeServer, byte_tokenizer: Tokenizer) -> None:
    for prompt in ("ab", byte_tokenizer.encode("ab")):
        assert echoing.complete(prompt=prompt, echo=True).json()["choices"][0]["text"] == "ab<ab>"
        assert texts(chunks_of(echoing.complete(prompt=prompt, echo=True, stream=True).text)) == "ab<ab>"


def test_logprobs_tell_the_chosen_token_and_others_by_their_text(server: FakeServer) -> None:
    logprobs = server.complete(prompt="x", logprobs=1, max_tokens=3).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["A", "n", " "]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"] == [{"A": -0.5}, {"n": -0.5}, {" ": -0.5}]


def test_logprobs_of_zero_alternatives_have_the_chosen_token(server: FakeServer) -> None:
    logprobs = server.complete(prompt="x", logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"A": -0.5}]


@pytest.mark.parametrize("echo", [False, True])
def test_the_tokens_of_one_character_begin_where_it_does(server: FakeServer, echo: bool) -> None:
    server.engine.answer = lambda prompt, sampling: "a東é!" + END
    fields = {"prompt": "ü: ", "logprobs": 0, "echo": echo}
    (choice,) = server.complete(**fields).json()["choices"]
    begin = 3 if echo else 0
    expected = [0, 0, 1, 2] if echo else []
    expected += [begin + place for place in (0, 1, 1, 1, 2, 2, 3, 4)]
    assert choice["logprobs"]["text_offset"] == expected
    assert choice["text"][begin + 3] == "!"
    chunks = chunks_of(server.complete(**fields, stream=True).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [place for part in parts if part for place in part["text_offset"]] == expected


def test_without_a_tokenizer_prompts_and_outputs_are_token_ids() -> None:
    with fake_server(None) as server:
        server.engine.answer = lambda prompt, sampling: "5 6 7"
        answer = server.complete(prompt=[1, 2], return_token_ids=True, logprobs=0).json()
        assert answer["choices"][0]["token_ids"] == [5, 6, 7]
        assert answer["choices"][0]["prompt_token_ids"] == [1, 2]
        assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:5", "token_id:6", "token_id:7"]
        for refused in (server.complete(prompt="text"), server.chat()):
            assert refused.status_code == 400
            assert "no tokenizer" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_not_there_is_refused_by_name(server: FakeServer, fields: dict, param: str) -> None:
    response = server.complete(prompt="x", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
