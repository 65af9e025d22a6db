"""Every error has OpenAI's shape and status, and gives nothing of the host away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_server import CHAT, COMPLETIONS, MAX_MODEL_LEN, MODEL, FakeServer
from tests.support.sse import chat_text, chunks_of, events_of, finish_reasons
from tprt.errors import EngineBusyError, EngineDeadError, InvalidRequestError
from tprt.server.http.errors import without_paths

USER = [{"role": "user", "content": "Hi"}]


def error_of(response: Any, status: int) -> dict[str, Any]:
    """Return the error object; its form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "b"}, "guided_json": {}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "b"}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": [{}]}, "tools[0].type"),
    ],
)
def test_a_wrong_field_is_named(server: FakeServer, fields: dict[str, Any], param: str) -> None:
    response = server.client.post(CHAT, json={"messages": USER, **fields})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert server.engine.submitted == []


def test_a_missing_field_is_named(server: FakeServer) -> None:
    error = error_of(server.client.post(CHAT, json={"model": MODEL}), 400)
    assert error["message"] == "Missing required parameter: 'messages'."
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b'"text"',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": Infinity, "messages": [{"role": "user", "content": "x"}]}',
        b'{"seed": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server: FakeServer, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(server.client.post(CHAT, content=body, headers=headers), 400)


def test_a_body_of_another_type_is_refused(server: FakeServer) -> None:
    body = json.dumps({"messages": USER}).encode()
    response = server.client.post(CHAT, content=body, headers={"Content-Type": "text/plain"})
    assert "application/json" in error_of(response, 415)["message"]


def test_half_a_surrogate_pair_within_arguments_is_refused(server: FakeServer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [*USER, {"role": "assistant", "tool_calls": [call]}]
    error_of(server.client.post(CHAT, json={"messages": messages}), 400)


def test_an_unknown_model_is_not_found(server: FakeServer) -> None:
    for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "x"})):
        error = error_of(server.client.post(path, json={"model": "gpt", **body}), 404)
        assert (error["code"], "`gpt`" in error["message"]) == ("model_not_found", True)


def test_a_prompt_that_is_too_long_tells_both_numbers(server: FakeServer) -> None:
    error = error_of(server.complete(prompt="x" * (MAX_MODEL_LEN + 5)), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in error["message"]
    assert str(MAX_MODEL_LEN + 5) in error["message"]


def test_more_tokens_than_the_context_leaves_are_refused(server: FakeServer) -> None:
    error = error_of(server.complete(prompt="x" * 12, max_tokens=MAX_MODEL_LEN), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_MODEL_LEN + 12) in error["message"]


def test_parts_that_are_not_text_are_refused(server: FakeServer) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:..."}}]
    response = server.client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert "image_url" in error_of(response, 400)["message"]


def test_a_grammar_that_cannot_be_compiled_is_refused(server: FakeServer) -> None:
    assert "regular expression" in error_of(server.chat(guided_regex="["), 400)["message"]


def test_paths_and_methods_that_there_are_not(server: FakeServer) -> None:
    missing = error_of(server.client.post("/v1/embeddings", json={}), 404)
    assert missing["message"] == "Invalid URL (POST /v1/embeddings)"
    response = server.client.get(CHAT)
    assert "GET" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (EngineBusyError("the queue is full", 7), 429, "rate_limit_exceeded"),
        (EngineDeadError("rank 1 died\nTraceback in /home/user/secret.py"), 503, "engine_dead"),
        (InvalidRequestError("no such token"), 400, None),
    ],
)
def test_what_the_engine_refuses_has_a_status(
    server: FakeServer, raised: Any, status: int, code: str | None, streams: bool
) -> None:
    server.engine.refusal = raised
    response = server.chat(stream=streams)
    error = error_of(response, status)
    assert error["code"] == code
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


def test_a_refusal_that_comes_by_the_stream_has_a_status_as_well(server: FakeServer) -> None:
    server.engine.stays_silent = True
    submit = server.engine.submit

    def submit_and_refuse(*arguments: Any) -> Any:
        stream = submit(*arguments)
        stream.completion.error = "the prompt has a token that there is not"
        return stream

    server.engine.submit = submit_and_refuse  # type: ignore[method-assign]
    for streams in (False, True):
        assert "token" in error_of(server.chat(stream=streams), 400)["message"]


def test_more_choices_than_there_are_places_are_refused_before_any_is_begun(server: FakeServer) -> None:
    server.engine.num_places = 5
    error_of(server.chat(n=6), 400)
    for streams in (False, True):
        error_of(server.complete(prompt=["a", "b"], n=3, stream=streams), 400)
    assert server.engine.submitted == []


def test_a_failure_in_mid_stream_is_an_event_and_the_end(server: FakeServer) -> None:
    server.engine.failure = EngineDeadError("rank 0 died\nTraceback in /home/user/secret.py")
    response = server.chat(stream=True)
    assert response.status_code == 200
    *chunks, last = events_of(response.text)
    assert chunks
    assert json.loads(last)["error"]["code"] == "engine_dead"
    assert "[DONE]" not in response.text
    assert "secret" not in response.text


def test_a_failure_of_one_choice_ends_all(server: FakeServer) -> None:
    server.engine.failure = EngineDeadError("gone")
    error_of(server.chat(n=3), 503)
    assert json.loads(events_of(server.chat(n=3, stream=True).text)[-1])["error"]["code"] == "engine_dead"


def test_requests_that_come_before_the_engine_is_ready_are_told_to_come_again(server: FakeServer) -> None:
    server.engine.ready = None
    for response in (server.chat(), server.complete(prompt="x"), server.chat(stream=True)):
        assert error_of(response, 503)["code"] == "not_ready"
        assert int(response.headers["retry-after"]) >= 1


def test_an_output_that_the_server_ends_is_cut_short_as_by_a_limit(server: FakeServer) -> None:
    server.engine.aborts_after = 3
    choice = server.chat().json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("An ", "length")
    chunks = chunks_of(server.chat(stream=True).text)
    assert (chat_text(chunks), finish_reasons(chunks)) == ("An ", ["length"])


def test_an_output_that_the_server_ends_before_its_first_token_is_an_error(server: FakeServer) -> None:
    server.engine.aborts_after = 0
    for streams in (False, True):
        assert error_of(server.chat(stream=streams), 503)["code"] == "aborted"


def test_a_bug_is_an_error_without_its_traceback(server: FakeServer) -> None:
    def fail(prompt: object, sampling: object) -> str:
        raise RuntimeError("/a/secret/path")

    server.engine.submit = fail  # type: ignore[method-assign]
    response = server.chat()
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_a_bug_in_mid_stream_is_an_error_event_without_its_traceback(server: FakeServer) -> None:
    server.engine.failure = RuntimeError("/a/secret/path")  # type: ignore[assignment]
    response = server.chat(stream=True)
    assert json.loads(events_of(response.text)[-1])["error"]["code"] == "internal_error"
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /home/user/x.json: no", "cannot read (path): no"),
        ("in '/etc/a b'", "in '(path) b'"),
        ("1/2 of a/b and /v1", "1/2 of a/b and /v1"),
        ("first\nFile /x/y.py", "first"),
    ],
)
def test_messages_are_freed_of_paths(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_the_description_tells_of_errors_and_loads_nothing_from_elsewhere(server: FakeServer) -> None:
    document = server.client.get("/openapi.json").json()
    assert {CHAT, COMPLETIONS, "/v1/models", "/tokenize", "/detokenize", "/health"} <= set(document["paths"])
    assert "ErrorAnswer" in document["components"]["schemas"]
    assert str(Path.cwd()) not in json.dumps(document)
    for path in ("/docs", "/redoc"):
        error_of(server.client.get(path), 404)


def test_a_complete_stream_after_an_error_on_the_same_connection(server: FakeServer) -> None:
    error_of(server.chat(n=0), 400)
    assert chunks_of(server.chat(stream=True).text)
