"""`POST /v1/chat/completions`: a conversation in, the assistant's answer out.

Knows nothing of how tokens are made and of how bytes are sent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastapi import Request
from starlette.responses import JSONResponse, Response

from tprt.server.http.context import ServerContext
from tprt.server.http.disconnect import while_wanted
from tprt.server.http.errors import invalid
from tprt.server.http.event_stream import Emit, EventStream, event
from tprt.server.http.request_log import record_of
from tprt.server.openai.chat_answer import chat_choice
from tprt.server.openai.chat_stream import ChatChoiceStream
from tprt.server.openai.chat_tools import ToolUse, tool_use_of
from tprt.server.openai.chunk_template import stream_extras
from tprt.server.openai.generation import Generation, PromptJob, require_model, require_ready
from tprt.server.openai.grammars import chat_grammar
from tprt.server.openai.identity import AnswerHead, make_head
from tprt.server.openai.prompts import encode_messages, require_tokenizer, template_arguments
from tprt.server.openai.protocol_chat import ChatCompletionRequest
from tprt.server.openai.sampling import check_stream_options, num_tokens_to_generate, sampling_of
from tprt.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that the answer to one request depends on."""

    request: ChatCompletionRequest
    job: PromptJob
    tool_use: ToolUse
    tokenizer: Tokenizer
    generation: Generation
    head: AnswerHead


async def answer_chat(context: ServerContext, body: ChatCompletionRequest, request: Request) -> Response:
    """Serve one request.

    Raises:
        ApiError, TprtError: it cannot be served.
    """
    plan = await _plan(context, body, request)
    if body.stream:
        return EventStream(lambda emit: _stream(plan, emit))
    return JSONResponse(await while_wanted(_whole(plan), request.receive))


async def _plan(context: ServerContext, body: ChatCompletionRequest, request: Request) -> _Plan:
    require_model(context, body.model)
    check_stream_options(body)
    _check_logprobs(body)
    if body.echo:
        raise invalid("'echo' is not supported with messages; /v1/completions has it", "echo")
    ready = require_ready(context)
    tokenizer = require_tokenizer(context.tokenizer)
    tool_use = tool_use_of(body, tokenizer.tool_call_style)
    grammar = await chat_grammar(body, tool_use, tokenizer)
    arguments = template_arguments(body.chat_template_kwargs, body.add_generation_prompt)
    ids = await encode_messages(tokenizer, body.messages, tool_use.tools, arguments)
    asked = body.max_completion_tokens or body.max_tokens
    max_tokens = num_tokens_to_generate(asked, None, len(ids), ready.max_model_len, "messages")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(body, max_tokens, num_logprobs, grammar, context.sampling_defaults)
    job = PromptJob(ids, sampling)
    record = record_of(request.scope)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = make_head(context, record, "chatcmpl", kind)
    return _Plan(body, job, tool_use, tokenizer, Generation(context, record, head.id), head)


def _check_logprobs(body: ChatCompletionRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' is only allowed when 'logprobs' is true", "top_logprobs")


async def _whole(plan: _Plan) -> dict[str, object]:
    body, generation = plan.request, plan.generation
    async with generation.running([plan.job], body.num_choices):
        outputs = await generation.collect()
    choices = []
    for index, output in enumerate(outputs):
        choice = chat_choice(index, output, plan.tool_use, plan.tokenizer, bool(body.logprobs))
        choices.append(choice | ({"token_ids": output.token_ids} if body.return_token_ids else {}))
    answer = {**plan.head.fields(), "choices": choices, "usage": generation.usage()}
    return answer | ({"prompt_token_ids": plan.job.prompt_token_ids} if body.return_token_ids else {})


async def _stream(plan: _Plan, emit: Emit) -> None:
    body = plan.request
    extras = replace(stream_extras(body, bool(body.logprobs)), prompt_token_ids=plan.job.prompt_token_ids)
    head = plan.head.fields()
    choices = [
        ChatChoiceStream(head, index, plan.tool_use, extras, plan.tokenizer)
        for index in range(body.num_choices)
    ]
    async with plan.generation.running([plan.job], body.num_choices):
        await plan.generation.stream(choices, emit, extras.usage_always)
    if extras.usage_at_end:
        await emit(event({**head, "choices": [], "usage": plan.generation.usage()}))
