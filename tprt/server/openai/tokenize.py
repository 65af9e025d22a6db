"""`POST /tokenize` and `POST /detokenize`, in the shapes that vLLM has.

Knows nothing of the engine but how long a context it allows.
"""

from __future__ import annotations

from tprt.server.http.context import ServerContext
from tprt.server.http.errors import invalid
from tprt.server.openai.generation import require_model, require_ready
from tprt.server.openai.prompts import (
    encode_messages,
    encode_texts,
    off_loop,
    require_tokenizer,
    template_arguments,
)
from tprt.server.openai.protocol_tokenize import DetokenizeRequest, TokenizeRequest
from tprt.server.tokenizer import Tokenizer


async def tokenize(context: ServerContext, body: TokenizeRequest) -> dict[str, object]:
    """Return the token ids of a prompt or of a conversation.

    Raises:
        ApiError, InvalidRequestError: there is not exactly one of them, or it cannot be encoded.
    """
    require_model(context, body.model)
    tokenizer = require_tokenizer(context.tokenizer)
    max_model_len = require_ready(context).max_model_len
    ids = await _encode(tokenizer, body)
    texts = await off_loop(len(ids), lambda: _texts(tokenizer, ids)) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": texts}


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in ids]


async def _encode(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either 'prompt' or 'messages'", "prompt")
    if body.messages is None:
        (ids,) = await encode_texts(tokenizer, [body.prompt or ""], body.add_special_tokens is not False)
        return ids
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    arguments = template_arguments(body.chat_template_kwargs, body.add_generation_prompt)
    return await encode_messages(tokenizer, body.messages, tools, arguments)


async def detokenize(context: ServerContext, body: DetokenizeRequest) -> dict[str, object]:
    """Return the text of token ids, special tokens left out.

    Raises:
        ApiError: there is no tokenizer.
    """
    require_model(context, body.model)
    tokenizer = require_tokenizer(context.tokenizer)
    return {"prompt": await off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens))}
