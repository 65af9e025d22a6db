"""The real application in front of an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tprt.config import Config, ModelConfig, ServerConfig
from tprt.errors import InvalidRequestError, TprtError
from tprt.messages import EngineReady, EngineStats, FinishReason, PromptLogprobs, SamplingParams
from tprt.server.completion import Completion, TokenLogprobs
from tprt.server.http.app import make_app
from tprt.server.http.context import ServerContext
from tprt.server.http.request_log import RequestTracer
from tprt.server.metrics import ServerMetrics
from tprt.server.request_stream import RequestStream
from tprt.server.sampling_defaults import SamplingDefaults
from tprt.server.tokenizer import Tokenizer

MODEL = "fake/model"
MAX_MODEL_LEN = 512
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
END = "<|im_end|>"
_PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Answer = Callable[[list[int], SamplingParams], str]


def save_byte_tokenizer(folder: Path, *, with_tools: bool = False) -> Path:
    """Write a tokenizer of bytes, with a chat template, into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken("<|im_start|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_TOOLS_TEMPLATE if with_tools else _PLAIN_TEMPLATE)
    return folder


class FakeEngine:
    """An engine whose outputs are `answer(prompt, sampling)`, a few tokens at a time.

    Attributes:
        answer: the text of an output; `END` after it ends it, else `max_tokens` does.
        refusal: raised by `submit`.
        failure: raised in the stream after the first tokens.
        stays_silent: no token ever comes.
        tokens_at_once: tokens that come together.
        aborts_after: every request is ended by the engine after so many tokens.
        first_delay_s: the first request gets its tokens so much later.
        num_places: most sequences of a request.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.ready: EngineReady | None = EngineReady(0, 2, 64, 16, MAX_MODEL_LEN)
        self.stats: EngineStats | None = None
        self.health = (True, "nothing to do")
        self.answer: Answer = lambda prompt, sampling: "An answer: 42 ✓." + END
        self.refusal: TprtError | None = None
        self.failure: TprtError | None = None
        self.stays_silent = False
        self.tokens_at_once = 3
        self.aborts_after: int | None = None
        self.first_delay_s = 0.0
        self.num_cached = 0
        self.queue_s: float | None = None
        self.num_places = 1000
        self.submitted: list[tuple[list[int], SamplingParams, str]] = []
        self.aborted: list[str] = []
        self._running: dict[str, RequestStream] = {}
        self._tokenizer = tokenizer

    def is_healthy(self) -> tuple[bool, str]:
        return self.health

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self) -> list[tuple[str, Completion, float]]:
        return [(stream.name, stream.completion, stream.started_s) for stream in self._running.values()]

    def require_places(self, count: int) -> None:
        if count > self.num_places:
            raise InvalidRequestError(f"there are {self.num_places} places")

    def submit(self, prompt: list[int], sampling: SamplingParams, request_id: str = "") -> RequestStream:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append((prompt, sampling, request_id))
        completion = Completion(prompt, sampling, num_cached_tokens=self.num_cached, queue_s=self.queue_s)
        stream = RequestStream(request_id, completion, _NoMeter(), lambda: self._leave(request_id))
        self._running[request_id] = stream
        if not self.stays_silent:
            ids = self._ids(self.answer(prompt, sampling))
            delay_s = self.first_delay_s if len(self.submitted) == 1 else 0.0
            asyncio.get_running_loop().call_later(delay_s, self._advance, stream, ids)
        return stream

    def _ids(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return [int(part) for part in text.split()]
        return self._tokenizer.encode(text)

    def _advance(self, stream: RequestStream, ids: list[int]) -> None:
        completion = stream.completion
        now, later = ids[: self.tokens_at_once], ids[self.tokens_at_once :]
        if self.aborts_after is not None:
            now, later = ids[: self.aborts_after], []
        self._score_prompt(completion)
        for token_id in now:
            if not completion.finished:
                self._append(completion, token_id)
        if not later:
            reason = FinishReason.STOP if self.aborts_after is None else FinishReason.ABORT
            completion.finish(reason, self._tokenizer)
        stream.on_news()
        if self.failure is not None:
            stream.fail(self.failure)
        elif completion.finished:
            self._running.pop(stream.name, None)
        else:
            asyncio.get_running_loop().call_soon(self._advance, stream, later)

    def _score_prompt(self, completion: Completion) -> None:
        num_top = completion.sampling.prompt_logprobs
        if num_top is not None and not completion.prompt_parts:
            for place, token_id in enumerate(completion.prompt_token_ids[1:]):
                arrays = np.array([7, token_id], np.int32), np.array([-0.25, -1.0 - place], np.float32)
                best = (column[:num_top] for column in arrays)
                completion.prompt_parts.append(PromptLogprobs(0, arrays[1][1:], *best, num_top=num_top))

    def _append(self, completion: Completion, token_id: int) -> None:
        sampling = completion.sampling
        if sampling.logprobs is not None:
            top = ((token_id, -0.5), (7, -1.5), (8, float("-inf")))[: sampling.logprobs]
            completion.logprobs.append(TokenLogprobs(token_id, -0.5, top))
        completion.append(token_id, self._tokenizer)
        if len(completion.token_ids) == sampling.max_tokens:
            completion.finish(FinishReason.LENGTH, self._tokenizer)

    def _leave(self, name: str) -> None:
        stream = self._running.pop(name, None)
        if stream is not None:
            self.aborted.append(name)
            stream.completion.finish(FinishReason.ABORT, self._tokenizer)


class _NoMeter:
    def on_tokens(self, count: int) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


@dataclass
class FakeServer:
    """The application, its engine, and a client of it."""

    engine: FakeEngine
    client: TestClient

    def chat(self, text: str = "Hi", **fields: Any) -> Any:
        return self.client.post(CHAT, json={"messages": [{"role": "user", "content": text}], **fields})

    def complete(self, **fields: Any) -> Any:
        return self.client.post(COMPLETIONS, json=fields)


@contextmanager
def fake_server(
    tokenizer: Tokenizer | None,
    api_keys: tuple[str, ...] = (),
    sampling_defaults: SamplingDefaults | None = None,
    tracer: RequestTracer | None = None,
    **server: object,
) -> Iterator[FakeServer]:
    """Serve in this process; at the end no sequence may be left in the engine."""
    engine, context = make_context(tokenizer, api_keys, **server)
    defaults = sampling_defaults or context.sampling_defaults
    context = replace(context, sampling_defaults=defaults, tracer=tracer)
    with TestClient(make_app(context), raise_server_exceptions=False) as client:
        yield FakeServer(engine, client)
    assert engine.num_running == 0, "a sequence was left in the engine"


def make_context(
    tokenizer: Tokenizer | None,
    api_keys: tuple[str, ...] = (),
    **server: object,
) -> tuple[FakeEngine, ServerContext]:
    """Return an engine, and the context of a server in front of it; `server` are settings."""
    engine = FakeEngine(tokenizer)
    context = ServerContext(
        config=Config(model=ModelConfig(path="nowhere/to/be/found"), server=ServerConfig(**server)),
        engine=engine,  # type: ignore[arg-type]
        tokenizer=tokenizer,
        metrics=ServerMetrics(MODEL),
        model_name=MODEL,
        created_s=int(time.time()),
        api_keys=api_keys,
        heartbeats=[lambda: None],
    )
    return engine, context
