"""The requests that turn text into token ids and back, as vLLM has them.

Knows nothing of generation.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tprt.server.openai.protocol_chat import ChatMessage, Tool
from tprt.server.openai.protocol_common import ProtocolModel, TokenId


class TokenizeRequest(ProtocolModel):
    """`POST /tokenize`: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    """Text."""
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """A conversation, which is rendered with the chat template first."""
    add_special_tokens: bool | None = None
    """For a prompt: add what the tokenizer puts around a text; true when left out."""
    add_generation_prompt: bool | None = None
    """For messages: end with the beginning of the assistant's answer; true when left out."""
    return_token_strs: bool | None = None
    """Return the text of each token as well."""
    tools: list[Tool] | None = None
    """For messages: functions that the model may call."""
    chat_template_kwargs: dict[str, Any] | None = None
    """For messages: passed on to the chat template."""


class DetokenizeRequest(ProtocolModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
    """Token ids."""
