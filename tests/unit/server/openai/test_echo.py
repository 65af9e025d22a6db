"""Echoed prompts have log-probabilities in OpenAI's form, whole and streamed, also with no output at all."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fake_server import END, FakeServer
from tests.support.sse import chunks_of
from tprt.server.tokenizer import Tokenizer

NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture
def echoing(server: FakeServer) -> FakeServer:
    """A server whose outputs are `xy`."""
    server.engine.answer = lambda prompt, sampling: "xy" + END
    return server


def ask(server: FakeServer, **fields: Any) -> dict[str, Any]:
    response = server.complete(**{"prompt": "abc", "echo": True, "logprobs": 1, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: FakeServer, **fields: Any) -> list[dict[str, Any]]:
    fields = {"stream": True, "stream_options": {"include_usage": True}, **fields}
    return chunks_of(server.complete(**{"prompt": "abc", "echo": True, "logprobs": 1, **fields}).text)


def join(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """Put the chunks of a choice together to what a whole answer has of it."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    return {
        "text": "".join(part["text"] for part in parts),
        "index": index,
        "logprobs": {name: [value for each in logprobs for value in each[name]] for name in NAMES},
        "finish_reason": parts[-1]["finish_reason"],
    }


def test_log_probabilities_are_of_prompt_and_output(echoing: FakeServer) -> None:
    (choice,) = ask(echoing)["choices"]
    assert choice["text"] == "abcxy"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "x", "y", END],
        "token_logprobs": [None, -1.0, -2.0, -0.5, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"b": -1.0, "(": -0.25},
            {"c": -2.0, "(": -0.25},
            {"x": -0.5},
            {"y": -0.5},
            {END: -0.5},
        ],
        "text_offset": [0, 1, 2, 3, 4, 5],
    }


def test_a_special_token_has_a_place_where_the_prompt_names_it(
    echoing: FakeServer, byte_tokenizer: Tokenizer
) -> None:
    text = f"é{END}b"
    (choice,) = ask(echoing, prompt=text)["choices"]
    assert choice["text"] == text + "xy"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1 + len(END), *(len(text) + n for n in range(3))]
    (choice,) = ask(echoing, prompt=byte_tokenizer.encode(text))["choices"]
    assert choice["text"] == "ébxy"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3, 4]


def test_an_echo_without_logprobs_asks_for_none(echoing: FakeServer) -> None:
    assert ask(echoing, logprobs=None)["choices"][0]["logprobs"] is None
    assert echoing.engine.submitted[0][1].prompt_logprobs is None


def test_logprobs_without_an_echo_are_those_of_the_output(echoing: FakeServer) -> None:
    assert ask(echoing, echo=False)["choices"][0]["logprobs"]["tokens"] == ["x", "y", END]
    assert echoing.engine.submitted[0][1].prompt_logprobs is None


def test_the_first_chunk_of_a_stream_has_the_prompt(echoing: FakeServer) -> None:
    echoing.engine.tokens_at_once = 1
    (whole,), (first, *others, _) = ask(echoing)["choices"], stream(echoing)
    assert first["choices"][0]["text"] == "abcx"
    assert first["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c", "x"]
    assert join([first, *others]) == whole


@pytest.mark.parametrize("num_choices", [1, 2])
def test_no_output_leaves_the_prompt_alone(echoing: FakeServer, num_choices: int) -> None:
    answer = ask(echoing, max_tokens=0, n=num_choices, return_token_ids=True)
    *chunks, last = stream(echoing, max_tokens=0, n=num_choices)
    for index, choice in enumerate(answer["choices"]):
        assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("abc", "length", [])
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
        assert join(chunks, index) == {name: choice[name] for name in join(chunks, index)}
    assert len(answer["choices"]) == num_choices
    assert answer["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] == 3
    assert {sampling.max_tokens for _, sampling, _ in echoing.engine.submitted} == {1}


def test_no_output_without_logprobs_is_the_prompt(echoing: FakeServer) -> None:
    (choice,) = ask(echoing, max_tokens=0, logprobs=None)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("abc", None)


def test_one_token_of_output_follows_the_prompt(echoing: FakeServer) -> None:
    (choice,) = ask(echoing, max_tokens=1)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -0.5]


def test_only_the_first_choice_of_a_prompt_scores_it_and_all_tell(echoing: FakeServer) -> None:
    fields = {"prompt": ["abc", "de"], "n": 2}
    answer, (*chunks, _) = ask(echoing, **fields), stream(echoing, **fields)
    wanted = [sampling.prompt_logprobs for _, sampling, _ in echoing.engine.submitted]
    assert wanted == [1, None, 1, None] * 2
    tokens = [choice["logprobs"]["tokens"][:-3] for choice in answer["choices"]]
    assert tokens == [["a", "b", "c"], ["a", "b", "c"], ["d", "e"], ["d", "e"]]
    assert [join(chunks, index) for index in range(4)] == answer["choices"]


def test_a_choice_that_is_sooner_waits_for_the_one_that_scores(echoing: FakeServer) -> None:
    echoing.engine.first_delay_s = 0.05
    *chunks, _ = stream(echoing, n=2)
    assert chunks[0]["choices"][0]["index"] == 0
    assert join(chunks, 1)["logprobs"]["token_logprobs"][:3] == [None, -1.0, -2.0]


def test_a_prompt_of_one_token_has_no_log_probability(echoing: FakeServer) -> None:
    (choice,) = ask(echoing, prompt="a", max_tokens=0)["choices"]
    assert (choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]) == (["a"], [None])


def test_an_output_begins_where_the_text_of_its_prompt_ends(echoing: FakeServer) -> None:
    # Two tokens of one byte each, neither of which is a character by itself.
    (choice,) = ask(echoing, prompt="é")["choices"]
    assert choice["text"] == "éxy"
    assert choice["logprobs"]["text_offset"][2:] == [1, 2, 3]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_that_the_server_gives_up_is_an_error(echoing: FakeServer, max_tokens: int) -> None:
    echoing.engine.aborts_after = 0
    response = echoing.complete(prompt="abc", echo=True, logprobs=1, max_tokens=max_tokens)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "aborted"


def test_messages_have_no_echo(server: FakeServer) -> None:
    response = server.chat(echo=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "echo"
    assert server.chat(echo=False).status_code == 200


def test_a_long_prompt_is_told_as_a_short_one_is(echoing: FakeServer) -> None:
    """Its log-probabilities are put together in a thread."""
    (choice,) = ask(echoing, prompt="ab" * 200)["choices"]
    *chunks, _ = stream(echoing, prompt="ab" * 200)
    assert choice["logprobs"]["tokens"] == [*"ab" * 200, "x", "y", END]
    assert choice["logprobs"]["token_logprobs"][:400] == [None, *(-1.0 - place for place in range(399))]
    assert join(chunks) == choice
