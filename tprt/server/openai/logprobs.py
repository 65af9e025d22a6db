"""Log-probabilities in the two forms that OpenAI has: one for chat, one for completions.

Knows nothing of how they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tprt.server.completion import Completion, TokenLogprobs
from tprt.server.text_streams import REPLACEMENT
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
    """Where each token begins in the text that it is part of, in characters.

    The tokens of one character all begin where that does, and so does what has no text where it stands.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.begin_text(0)

    def begin_text(self, place: int, text: str = "") -> None:
        """Let the next token be the first of a text that begins at `place`.

        In one that is given, as a prompt is, special tokens may stand by their names.
        """
        self._next = place
        self._text = text
        self._stream = None if self._tokenizer is None else self._tokenizer.decode_stream()

    def place(self, token_ids: Sequence[int], names: Sequence[str]) -> list[int]:
        """Return where the next tokens begin; `names` are their texts, each alone."""
        return [self._place(token_id, name) for token_id, name in zip(token_ids, names, strict=True)]

    def _place(self, token_id: int, name: str) -> int:
        came = name if self._stream is None else self._stream.step(token_id)
        if not came and REPLACEMENT not in name and self._text.startswith(name, self._next):
            came = name
        # What was held back comes before the token's own text.
        place = self._next + max(0, len(came) - len(name))
        self._next += len(came)
        return place


def echoed_logprobs(
    prompt: Completion, tokenizer: Tokenizer | None, offsets: TextOffsets
) -> dict[str, list[Any]]:
    """Return the `logprobs` of the prompt of a completion; its first token has none."""
    token_id = prompt.prompt_token_ids[0]
    text = _text(token_id, tokenizer)
    first: dict[str, list[Any]] = {
        "tokens": [text],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": offsets.place([token_id], [text]),
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
        "text_offset": offsets.place([token.token_id for token in tokens], texts),
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
