"""One choice of a completion, whole or streamed.

Knows nothing of how it came to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tprt.server.completion import Completion
from tprt.server.openai.chunk_template import TEXT, ChunkTemplate, StreamExtras
from tprt.server.openai.generation import Output, finish_name
from tprt.server.openai.logprobs import (
    TextOffsets,
    completion_logprobs,
    echoed_logprobs,
    join_logprobs,
)
from tprt.server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tprt.server.async_engine import Delta


def completion_choice(
    index: int, output: Output, echoed: str, tokenizer: Tokenizer | None, with_logprobs: bool
) -> dict[str, object]:
    """Return one choice; `echoed` is put before its text."""
    logprobs = None
    if with_logprobs:
        offsets = TextOffsets(tokenizer)
        prompt = _prompt_part(output.prompt, echoed, tokenizer, offsets)
        logprobs = join_logprobs([*prompt, completion_logprobs(output.logprobs, tokenizer, offsets)])
    return {
        "text": echoed + output.text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": finish_name(output.finish_reason),
    }


def _prompt_part(
    prompt: Completion | None, text: str, tokenizer: Tokenizer | None, offsets: TextOffsets
) -> list[dict[str, list[Any]]]:
    """Return the `logprobs` of a prompt, after whose text the output begins; or nothing."""
    if prompt is None:
        return []
    offsets.begin_text(0, text)
    part = echoed_logprobs(prompt, tokenizer, offsets)
    offsets.begin_text(len(text))
    return [part]


class CompletionChoiceStream:
    """Makes the events of one choice."""

    def __init__(
        self,
        head: Mapping[str, object],
        index: int,
        echoed: str,
        extras: StreamExtras,
        tokenizer: Tokenizer | None,
    ) -> None:
        example = {"text": TEXT, "logprobs": None, "finish_reason": None}
        self._template = ChunkTemplate(head, index, example, extras.usage_at_end)
        self._extras = extras
        self._is_plain = extras.are_plain
        self._echoed = echoed
        self._prompt_text = echoed
        self._tokenizer = tokenizer
        self._offsets = TextOffsets(tokenizer)
        self._has_begun = False

    def events(self, delta: Delta, usage: Mapping[str, object] | None = None) -> bytes:
        """Return the event that tells of `delta`; none where it has brought nothing to show."""
        text = self._echoed + delta.text if self._echoed else delta.text
        self._echoed = ""
        reason = delta.finish_reason
        if self._is_plain and reason is None:
            return self._template.text(text) if text else b""
        shown = delta.token_ids and not self._is_plain
        if not (text or shown or reason):
            return b""
        choice: dict[str, object] = {
            "text": text,
            "logprobs": self._logprobs(delta),
            "finish_reason": None if reason is None else finish_name(reason),
        }
        if self._extras.token_ids:
            choice["token_ids"] = delta.token_ids
            if not self._has_begun:
                choice["prompt_token_ids"] = self._extras.prompt_token_ids
        self._has_begun = True
        return self._template.chunk(choice, usage)

    def _logprobs(self, delta: Delta) -> Mapping[str, object] | None:
        if not self._extras.logprobs:
            return None
        parts = _prompt_part(delta.prompt, self._prompt_text, self._tokenizer, self._offsets)
        if delta.logprobs:
            parts.append(completion_logprobs(delta.logprobs, self._tokenizer, self._offsets))
        return join_logprobs(parts) if parts else None
