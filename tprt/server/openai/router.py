"""The endpoints of the OpenAI protocol, and their place in the server's own description (OpenAPI).

Knows nothing of how they are served.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from tprt.server.http.context import ServerContext
from tprt.server.http.json_route import JsonRoute
from tprt.server.openai import models, tokenize
from tprt.server.openai.chat import answer_chat
from tprt.server.openai.completions import answer_completion
from tprt.server.openai.error_docs import ERROR_RESPONSES
from tprt.server.openai.protocol_chat import ChatCompletionRequest
from tprt.server.openai.protocol_completion import CompletionRequest
from tprt.server.openai.protocol_tokenize import DetokenizeRequest, TokenizeRequest

_STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer, or with `stream` its chunks as events, the last of which is `[DONE]`",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **ERROR_RESPONSES,
}


def make_openai_router(context: ServerContext) -> APIRouter:
    """Return the endpoints, which serve from `context`."""
    router = APIRouter(route_class=JsonRoute)
    _add_generation(router, context)
    _add_models(router, context)
    _add_tokens(router, context)
    return router


def _add_generation(router: APIRouter, context: ServerContext) -> None:
    @router.post("/v1/chat/completions", responses=_STREAMS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await answer_chat(context, body, request)

    @router.post("/v1/completions", responses=_STREAMS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from prompts."""
        return await answer_completion(context, body, request)


def _add_models(router: APIRouter, context: ServerContext) -> None:
    @router.get("/v1/models", responses=ERROR_RESPONSES)
    async def list_models() -> Response:
        """List the models."""
        return JSONResponse(models.list_models(context))

    # Names of models have slashes.
    @router.get("/v1/models/{model_id:path}", responses=ERROR_RESPONSES)
    async def get_model(model_id: str) -> Response:
        """Describe a model."""
        return JSONResponse(models.get_model(context, model_id))


def _add_tokens(router: APIRouter, context: ServerContext) -> None:
    @router.post("/tokenize", responses=ERROR_RESPONSES)
    async def tokenize_text(body: TokenizeRequest) -> Response:
        """Return the token ids of a text or a conversation."""
        return JSONResponse(await tokenize.tokenize(context, body))

    @router.post("/detokenize", responses=ERROR_RESPONSES)
    async def detokenize_ids(body: DetokenizeRequest) -> Response:
        """Return the text of token ids."""
        return JSONResponse(await tokenize.detokenize(context, body))
