"""`POST /v1/completions`: prompts in, what follows them out.

Knows nothing of how tokens are made and of how bytes are sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from fastapi import Request
from starlette.responses import JSONResponse, Response

from tprt.server.http.context import ServerContext
from tprt.server.http.disconnect import while_wanted
from tprt.server.http.errors import invalid
from tprt.server.http.event_stream import Emit, EventStream, event
from tprt.server.http.request_log import record_of
from tprt.server.openai.chunk_template import stream_extras
from tprt.server.openai.completion_choice import CompletionChoiceStream, completion_choice
from tprt.server.openai.generation import Generation, Output, PromptJob, require_model, require_ready
from tprt.server.openai.grammars import completion_grammar
from tprt.server.openai.identity import AnswerHead, make_head
from tprt.server.openai.logprobs import logprobs_length
from tprt.server.openai.prompts import encode_texts, off_loop, require_tokenizer
from tprt.server.openai.protocol_completion import CompletionRequest
from tprt.server.openai.sampling import check_stream_options, num_tokens_to_generate, sampling_of
from tprt.server.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16
_Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that the answer to one request depends on; `echoed` has the text before each choice."""

    request: CompletionRequest
    jobs: list[PromptJob]
    echoed: list[str]
    tokenizer: Tokenizer | None
    generation: Generation
    head: AnswerHead


async def answer_completion(context: ServerContext, body: CompletionRequest, request: Request) -> Response:
    """Serve one request.

    Raises:
        ApiError, TprtError: it cannot be served.
    """
    plan = await _plan(context, body, request)
    if body.stream:
        return EventStream(lambda emit: _stream(plan, emit))
    return await while_wanted(_whole(plan), request.receive)


async def _plan(context: ServerContext, body: CompletionRequest, request: Request) -> _Plan:
    require_model(context, body.model)
    _refuse_what_is_not_there(body)
    ready = require_ready(context)
    grammar = await completion_grammar(body)
    jobs, echoed = [], []
    prompts = _prompts(body)
    for prompt, ids in zip(prompts, await _encode(context, body, prompts), strict=True):
        # Nothing is not what a sequence can end with: one token is generated and dropped.
        asked, default = 1 if body.max_tokens == 0 else body.max_tokens, _DEFAULT_MAX_TOKENS
        max_tokens = num_tokens_to_generate(asked, default, len(ids), ready.max_model_len, "prompt")
        sampling = sampling_of(body, max_tokens, body.logprobs, grammar, context.sampling_defaults)
        if body.echo:
            sampling = replace(sampling, prompt_logprobs=body.logprobs)
        jobs.append(PromptJob(ids, sampling, drops_output=body.max_tokens == 0))
        echoed += [_text(context, prompt) if body.echo else ""] * body.num_choices
    record = record_of(request.scope)
    head = make_head(context, record, "cmpl", "text_completion")
    return _Plan(body, jobs, echoed, context.tokenizer, Generation(context, record, head.id), head)


def _refuse_what_is_not_there(body: CompletionRequest) -> None:
    check_stream_options(body)
    if body.suffix:
        raise invalid("'suffix' is not supported", "suffix")
    if body.best_of is not None and body.best_of != body.num_choices:
        raise invalid(f"'best_of' is {body.best_of}; only the value of 'n' is supported", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("'max_tokens' is 0; expected 1 or more, or 'echo' with it", "max_tokens")


def _prompts(body: CompletionRequest) -> list[_Prompt]:
    """Return the prompts, of which one may stand alone."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [cast(_Prompt, prompt)]
    return cast("list[_Prompt]", prompt)


async def _encode(
    context: ServerContext, body: CompletionRequest, prompts: Sequence[_Prompt]
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded: Iterator[list[int]] = iter(())
    if texts:
        tokenizer = require_tokenizer(context.tokenizer)
        encoded = iter(await encode_texts(tokenizer, texts, body.add_special_tokens is not False))
    ids = [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if not all(ids):
        raise invalid("a prompt has no tokens; send some text", "prompt")
    return ids


def _text(context: ServerContext, prompt: _Prompt) -> str:
    return prompt if isinstance(prompt, str) else require_tokenizer(context.tokenizer).decode(prompt)


async def _whole(plan: _Plan) -> Response:
    body, generation = plan.request, plan.generation
    async with generation.running(plan.jobs, body.num_choices):
        outputs = await generation.collect()
    length = sum(logprobs_length(output.prompt) for output in outputs if output.prompt is not None)
    return await off_loop(length, lambda: JSONResponse(_answer(plan, outputs)))


def _answer(plan: _Plan, outputs: Sequence[Output]) -> dict[str, object]:
    body = plan.request
    choices = []
    for index, output in enumerate(outputs):
        with_logprobs = body.logprobs is not None
        choice = completion_choice(index, output, plan.echoed[index], plan.tokenizer, with_logprobs)
        if body.return_token_ids:
            prompt_ids = plan.jobs[index // body.num_choices].prompt_token_ids
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": prompt_ids}
        choices.append(choice)
    return {**plan.head.fields(), "choices": choices, "usage": plan.generation.usage()}


async def _stream(plan: _Plan, emit: Emit) -> None:
    body = plan.request
    extras = stream_extras(body, body.logprobs is not None)
    head = plan.head.fields()
    several = [replace(extras, prompt_token_ids=job.prompt_token_ids) for job in plan.jobs]
    choices = [
        CompletionChoiceStream(head, index, echoed, several[index // body.num_choices], plan.tokenizer)
        for index, echoed in enumerate(plan.echoed)
    ]
    async with plan.generation.running(plan.jobs, body.num_choices):
        await plan.generation.stream(choices, emit, extras.usage_always)
    if extras.usage_at_end:
        await emit(event({**head, "choices": [], "usage": plan.generation.usage()}))
