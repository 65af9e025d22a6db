"""Chat answers have OpenAI's form, whole and streamed, and ask the engine for what the request says."""

from __future__ import annotations

import pytest

from tests.support.fake_server import END, MAX_MODEL_LEN, MODEL, FakeServer
from tests.support.sse import chat_text, chunks_of, finish_reasons
from tprt.messages import Grammar, SamplingParams

TEXT = "An answer: 42 ✓."


def test_a_whole_answer_has_openais_fields(server: FakeServer) -> None:
    server.engine.num_cached = 16
    answer = server.chat(model=MODEL).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    assert answer["system_fingerprint"].startswith("fp_")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    num_prompt, num_output = len(server.engine.submitted[0][0]), len((TEXT).encode()) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


def test_a_stream_says_the_same_as_a_whole_answer(server: FakeServer) -> None:
    response = server.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = chunks_of(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chat_text(chunks) == TEXT
    assert finish_reasons(chunks) == ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == server.chat().json()["usage"]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_without_options_has_no_usage(server: FakeServer) -> None:
    assert all("usage" not in chunk for chunk in chunks_of(server.chat(stream=True).text))


def test_usage_comes_with_every_chunk_when_asked_for(server: FakeServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(server.chat(stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_tokens_that_come_together_are_one_chunk(server: FakeServer) -> None:
    server.engine.answer = lambda prompt, sampling: "x" * 60
    server.engine.tokens_at_once = 20
    chunks = chunks_of(server.chat(stream=True).text)
    assert len(chunks) <= 1 + 3 + 1
    assert chat_text(chunks) == "x" * 60


def test_choices_are_drawn_with_seeds_that_follow_each_other(server: FakeServer) -> None:
    server.engine.answer = lambda prompt, sampling: f"seed {sampling.seed}" + END
    answer = server.chat(n=3, seed=5).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["seed 5", "seed 6", "seed 7"]
    chunks = chunks_of(server.chat(n=3, seed=5, stream=True).text)
    assert [chat_text(chunks, index) for index in range(3)] == ["seed 5", "seed 6", "seed 7"]
    assert [finish_reasons(chunks, index) for index in range(3)] == [["stop"]] * 3


def test_a_prompt_counts_once_for_all_its_choices(server: FakeServer) -> None:
    one, three = server.chat().json()["usage"], server.chat(n=3).json()["usage"]
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"]


def test_logprobs_have_token_bytes_and_alternatives(server: FakeServer) -> None:
    server.engine.answer = lambda prompt, sampling: "é" + END
    (choice,) = server.chat(logprobs=True, top_logprobs=3).json()["choices"]
    first, second, end = choice["logprobs"]["content"]
    assert first["token"] == "�"
    assert bytes(first["bytes"] + second["bytes"]).decode() == "é"
    assert end["token"] == END
    assert first["logprob"] == -0.5
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5, -9999.0]


def test_a_stream_has_the_same_logprobs_as_a_whole_answer(server: FakeServer) -> None:
    whole = server.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    chunks = chunks_of(server.chat(logprobs=True, top_logprobs=1, stream=True).text)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in logprobs if part for entry in part["content"]] == whole


def test_token_ids_are_returned_when_asked_for(server: FakeServer) -> None:
    whole = server.chat(return_token_ids=True).json()
    assert whole["prompt_token_ids"] == server.engine.submitted[0][0]
    chunks = chunks_of(server.chat(return_token_ids=True, stream=True).text)
    streamed = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert streamed == whole["choices"][0]["token_ids"]
    assert len(streamed) == whole["usage"]["completion_tokens"]
    assert [chunk.get("prompt_token_ids") for chunk in chunks[:2]] == [whole["prompt_token_ids"], None]


def test_sampling_parameters_reach_the_engine(server: FakeServer) -> None:
    server.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "6": 1.5},
        stop=["a", "b", "c", "d", "e"],
        stop_token_ids=[3],
        max_completion_tokens=33,
        min_tokens=2,
        ignore_eos=True,
        guided_regex="[0-9]+",
    )
    (_, sampling, name) = server.engine.submitted[0]
    assert name.startswith("chatcmpl-")
    assert sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=2**63 - 1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias=((5, -100.0), (6, 1.5)),
        stop=("a", "b", "c", "d", "e"),
        stop_token_ids=(3,),
        max_tokens=33,
        min_tokens=2,
        ignore_eos=True,
        grammar=Grammar("regex", "[0-9]+"),
    )


def test_what_is_left_out_or_null_has_openais_default(server: FakeServer) -> None:
    server.chat()
    server.chat(temperature=None, top_p=None, stop=None, n=None, seed=None, max_tokens=None, stream=None)
    first, second = server.engine.submitted
    assert first[1] == second[1]
    assert first[1] == SamplingParams(max_tokens=MAX_MODEL_LEN - len(first[0]))


def test_an_output_that_reaches_max_tokens_ends_by_length(server: FakeServer) -> None:
    choice = server.chat(max_tokens=4).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("An a", "length")


def test_a_stop_string_ends_the_output_before_it(server: FakeServer) -> None:
    answer = server.chat(stop=": ").json()
    assert answer["choices"][0]["message"]["content"] == "An answer"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert chat_text(chunks_of(server.chat(stop=": ", stream=True).text)) == "An answer"


def test_messages_reach_the_template(server: FakeServer, byte_tokenizer: object) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    server.client.post("/v1/chat/completions", json={"messages": messages})
    text = byte_tokenizer.decode(server.engine.submitted[0][0])  # type: ignore[attr-defined]
    assert text == "system\nBe kind.\nuser\none\ntwo\nassistant\n"


def test_unknown_fields_are_ignored(server: FakeServer) -> None:
    assert server.chat(service_tier="auto", store=True, metadata={"a": "b"}, made_up=[1]).status_code == 200


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_message_without_content_is_refused(server: FakeServer, role: str) -> None:
    response = server.client.post("/v1/chat/completions", json={"messages": [{"role": role}]})
    assert response.status_code == 400
    assert "messages[0]" in response.json()["error"]["message"]
