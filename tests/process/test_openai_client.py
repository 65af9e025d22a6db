"""The official `openai` client, sync and async, against `tprt serve` with a real model on two CPU ranks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from launch import LLM, SamplingParams
from tests.support.serving import Served

CONFIG = "configs/smollm2-135m-tp2-cpu.yaml"
MODEL = "SmolLM2-135M-Instruct"
KEY = "a-key-of-this-test"
MAX_SEQS = 8
WAIT_S = 30.0
USER = [{"role": "user", "content": "Name three primary colors, and nothing else."}]
PROMPT = "The capital of France is"
# The model's own template knows no tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call them with <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "mix",
        "description": "Mixes two colors",
        "parameters": {
            "type": "object",
            "properties": {"first": {"enum": ["red", "blue"]}, "second": {"enum": ["yellow", "white"]}},
            "required": ["first", "second"],
            "additionalProperties": False,
        },
    },
}


class Color(BaseModel):
    name: str
    is_primary: bool


@dataclass
class Deployment:
    url: str
    served: Served

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(**{"base_url": self.url, "api_key": KEY, "max_retries": 0, "timeout": WAIT_S, **options})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / MODEL
    folder.mkdir()
    for file in Path(".models", MODEL).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def offline(model_folder: Path) -> dict[str, Any]:
    """What `LLM` generates greedily for prompt and messages, 12 tokens each, and how it scores the prompt."""
    with LLM(CONFIG, [f"model.path={model_folder}"]) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, prompt_logprobs=1)
        (completion,) = llm.generate(PROMPT, sampling, use_tqdm=False)
        (answer,) = llm.chat(USER, sampling, use_tqdm=False)
    assert completion.prompt_logprobs is not None
    scores = [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
    return {"completion": completion.outputs[0].text, "chat": answer.outputs[0].text, "prompt": scores}


@pytest.fixture(scope="module")
def deployment(model_folder: Path, offline: dict[str, Any], tmp_path_factory: Any) -> Iterator[Deployment]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    settings = (
        f"model.path={model_folder}",
        f"server.api_key_file={keys}",
        "server.max_queued_requests=0",
        f"scheduler.max_num_seqs={MAX_SEQS}",
    )
    with Served(CONFIG, *settings) as served:
        served.wait_until_ready()
        yield Deployment(f"http://{served.host}:{served.port}/v1", served)
        assert served.process.poll() is None, f"it ended by itself, with {served.end()}: {served.lines}"
        served.process.terminate()
        assert served.end() == 0


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[OpenAI]:
    with deployment.client() as client:
        yield client


def test_chat_says_what_the_library_says(client: OpenAI, offline: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=USER, temperature=0, max_completion_tokens=12)
    assert answer.choices[0].message.content == offline["chat"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_a_completion_says_what_the_library_says(client: OpenAI, offline: dict[str, Any]) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12, echo=True)
    assert answer.choices[0].text == PROMPT + offline["completion"]


def test_an_echoed_prompt_has_log_probabilities(client: OpenAI, offline: dict[str, Any]) -> None:
    """As lm-eval-harness scores: with no output, and with one token of it."""
    for max_tokens in (0, 1):
        fields = dict(model=MODEL, prompt=PROMPT, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
        answer = client.completions.create(**fields)
        (choice,) = answer.choices
        assert choice.logprobs is not None
        tokens, first = choice.logprobs.tokens, choice.logprobs.token_logprobs[0]
        num_prompt = len(tokens) - max_tokens
        assert "".join(tokens) == choice.text
        assert "".join(tokens[:num_prompt]) == PROMPT
        assert (first, choice.logprobs.top_logprobs[0], choice.logprobs.text_offset[0]) == (None, None, 0)
        assert choice.logprobs.token_logprobs[1:num_prompt] == pytest.approx(offline["prompt"], abs=1e-3)
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, choice.finish_reason) == (max_tokens, "length")
        chunk, *_ = client.completions.create(**fields, stream=True)
        assert chunk.choices[0].logprobs == choice.logprobs


def test_a_stream_with_usage(client: OpenAI, offline: dict[str, Any]) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=USER,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == offline["chat"]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("length", "stop")
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens <= 12
    # The same prompt has run before.
    assert last.usage.prompt_tokens_details is not None
    assert (last.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_the_clients_own_stream_helper(client: OpenAI) -> None:
    choices = {"guided_choice": ["red and blue", "yellow"]}
    with client.chat.completions.stream(model=MODEL, messages=USER, extra_body=choices) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert "".join(deltas) in choices["guided_choice"]


def test_the_async_client_streams_several_at_a_time(deployment: Deployment, offline: dict[str, Any]) -> None:
    async def one(client: AsyncOpenAI) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def several() -> list[str]:
        async with AsyncOpenAI(base_url=deployment.url, api_key=KEY, timeout=WAIT_S) as client:
            return await asyncio.gather(*(one(client) for _ in range(4)))

    assert asyncio.run(several()) == [offline["completion"]] * 4


def test_choices_and_seeds(client: OpenAI) -> None:
    def ask(seed: int, n: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, temperature=1.5, seed=seed, n=n, max_tokens=8
        )
        return [choice.message.content for choice in answer.choices]

    three = ask(5, 3)
    assert len(set(three)) > 1
    assert ask(5, 3) == three
    assert ask(6, 1) == three[1:2]


def test_logprobs_of_both_kinds(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert bytes(token.bytes or []).decode() == token.token
        assert len(token.top_logprobs) == 3
        # Greedy: the chosen one is the most likely.
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
    completion = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == completion.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 4
    assert (logprobs.text_offset or [])[0] == 0


def test_a_tool_that_must_be_called(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0,
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name == "mix"
    arguments = json.loads(call.function.arguments)
    assert arguments["first"] in ("red", "blue")
    again = client.chat.completions.create(
        model=MODEL,
        messages=[
            *USER,
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "orange"},
        ],
        tools=[TOOL],
        tool_choice="none",
        max_tokens=4,
    )
    assert again.choices[0].message.tool_calls is None


def test_a_tool_call_streams(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "mix"}}
    with client.chat.completions.stream(
        model=MODEL, messages=USER, tools=[TOOL], tool_choice=named, max_tokens=200, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "mix"
    assert json.loads(call.function.arguments)["second"] in ("yellow", "white")


def test_an_output_is_parsed_into_a_type(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "is_primary": {"type": "boolean"}},
        "required": ["name", "is_primary"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=100, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "color", "schema": schema}},
    )  # fmt: skip
    Color.model_validate_json(answer.choices[0].message.content or "")
    parsed = client.chat.completions.parse(
        model=MODEL, messages=USER, max_tokens=300, temperature=0, response_format=Color,
        extra_body={"repetition_penalty": 1.3},
    )  # fmt: skip
    assert isinstance(parsed.choices[0].message.parsed, Color)


def test_extra_parameters_of_vllm(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=8,
        extra_body={"structured_outputs": {"choice": ["Paris", "London"]}},
    )
    assert answer.choices[0].text in ("Paris", "London")


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_errors_have_the_clients_own_classes(deployment: Deployment, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=USER, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=USER)
    with deployment.client(api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError, match=f"asks for {MAX_SEQS + 1} outputs"):
        client.completions.create(model=MODEL, prompt=PROMPT, n=MAX_SEQS + 1)


def wait_until_idle(deployment: Deployment) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while (health := deployment.served.ask("GET", "/health")[2])["num_requests"]:
        assert time.monotonic() < deadline_s, health
        time.sleep(0.02)


def test_who_finds_all_places_taken_is_told_when_to_come_again(client: OpenAI, deployment: Deployment) -> None:
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**fields, n=MAX_SEQS, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model=MODEL, prompt=PROMPT)
    assert int(full.value.response.headers["retry-after"]) >= 1
    wait_until_idle(deployment)


def test_closing_a_stream_ends_its_sequence(client: OpenAI, deployment: Deployment) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_until_idle(deployment)


def test_a_request_id_comes_back(client: OpenAI) -> None:
    response = client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert response.headers["x-request-id"] == "mine-1"
    assert response.parse().id == "cmpl-mine-1"
