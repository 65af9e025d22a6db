"""Log-probabilities in the two forms that OpenAI has: one for chat, one for completions.

Knows nothing of how they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tprt.server.completion import Completion, TokenLogprobs
from tprt.server.tokenizer import Tokenizer

# JSON has no infinity; OpenAI reports tokens that cannot come by this value.
_LEAST = -9999.0
_CHARS_PER_ENTRY = 16


def chat_logprobs(tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, object]:
    """Return the `logprobs` of a chat choice."""
    content = []
    for token in tokens:
        entry = _chat_entry(token.token_id, token.logprob, tokenizer)
        entry["top_logprobs"] = [_chat_entry(token_id, value, tokenizer) for token_id, value in token.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def logprobs_length(prompt: Completion) -> int:
    """Return how long a text takes as long to encode as the `logprobs` of `prompt` to make: see `off_loop`."""
    return len(prompt.prompt_token_ids) * (1 + (prompt.sampling.prompt_logprobs or 0)) * _CHARS_PER_ENTRY


class TextOffsets:
    """Where each token of an output begins in its text, in characters."""

    def __init__(self) -> None:
        self._next = 0

    def place(self, texts: Sequence[str]) -> list[int]:
        """Return where the next tokens begin."""
        offsets = []
        for text in texts:
            offsets.append(self._next)
            self._next += len(text)
        return offsets

    def go_on_from(self, place: int) -> None:
        """Let the next token begin at `place`."""
        self._next = place


def echoed_logprobs(
    prompt: Completion, tokenizer: Tokenizer | None, offsets: TextOffsets
) -> dict[str, list[Any]]:
    """Return the `logprobs` of the prompt of a completion; its first token has none."""
    text = _text(prompt.prompt_token_ids[0], tokenizer)
    first: dict[str, list[Any]] = {
        "tokens": [text],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": offsets.place([text]),
    }
    return join_logprobs([first, completion_logprobs(prompt.prompt_logprobs, tokenizer, offsets)])


def join_logprobs(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Return the `logprobs` of tokens that follow each other; there is at least one part."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def completion_logprobs(
    tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer | None, offsets: TextOffsets
) -> dict[str, list[Any]]:
    """Return the `logprobs` of the next tokens of a completion's choice."""
    texts = [_text(token.token_id, tokenizer) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, _LEAST) for token in tokens],
        "top_logprobs": [_top(token, tokenizer) for token in tokens],
        "text_offset": offsets.place(texts),
    }


def _chat_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, _LEAST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _top(token: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Return the most likely tokens, and the chosen one where it is not among them."""
    top = {_text(token_id, tokenizer): max(value, _LEAST) for token_id, value in reversed(token.top)}
    top.setdefault(_text(token.token_id, tokenizer), max(token.logprob, _LEAST))
    return dict(sorted(top.items(), key=lambda item: -item[1]))


def _text(token_id: int, tokenizer: Tokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)
