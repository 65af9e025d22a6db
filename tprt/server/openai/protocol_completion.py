"""The request for a completion: prompts as text or as token ids.

Knows nothing of chat.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tprt.server.openai.protocol_common import NumTopLogprobs, SamplingFields, TokenId

MAX_PROMPTS = 1024


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ]
    )
    """A text, several texts, the token ids of a text, or those of several."""
    add_special_tokens: bool | None = None
    """Add what the tokenizer puts around a text to prompts that are text; true when left out."""
    echo: bool | None = None
    """Begin each output with its prompt, and its log-probabilities with those of the prompt."""
    logprobs: NumTopLogprobs | None = None
    """Report the log-probability of each token, and so many of the most likely ones."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens to generate; 0 only with echo."""
    suffix: str | None = None
    """Refused: text after the completion is not supported."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Refused unless it equals n."""
