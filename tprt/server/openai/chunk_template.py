"""Chunks of a stream, put together from halves that are made once for a choice.

The common chunk, some text and nothing else, costs a concatenation. Knows nothing of what is streamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring

from tprt.server.openai.protocol_common import SamplingFields

TEXT = "\x00text\x00"
"""Stands for the text in an example of a chunk; no other field has a null character."""


@dataclass(frozen=True, slots=True)
class StreamExtras:
    """What the chunks of a choice carry besides text.

    `usage_at_end` is a chunk of its own; with `token_ids`, the first chunk has `prompt_token_ids`.
    """

    logprobs: bool = False
    token_ids: bool = False
    usage_at_end: bool = False
    usage_always: bool = False
    prompt_token_ids: Sequence[int] = ()

    @property
    def are_plain(self) -> bool:
        """True when a chunk in the middle of the stream has text only."""
        return not (self.logprobs or self.token_ids or self.usage_always)


def stream_extras(fields: SamplingFields, with_logprobs: bool) -> StreamExtras:
    """Return what a request wants in its chunks."""
    return StreamExtras(
        with_logprobs, bool(fields.return_token_ids), fields.wants_usage_chunk, fields.wants_usage_always
    )


class ChunkTemplate:
    """Makes the events of one choice.

    The halves around the text are found by dumping an example and cutting it where its text is.
    """

    def __init__(
        self, head: Mapping[str, object], index: int, example: Mapping[str, object], has_usage: bool
    ) -> None:
        """Prepare the halves.

        Args:
            head: the first fields of every chunk.
            index: number of the choice.
            example: the fields of a choice, besides `index`, with `TEXT` for the text.
            has_usage: every chunk has a field `usage`, which is null unless it is given.
        """
        self._head = dict(head)
        self._index = index
        self._has_usage = has_usage
        before, after = self._event(example, None).split(encode_basestring(TEXT))
        self._before, self._after = before, after

    def text(self, text: str) -> bytes:
        """Return a chunk like the example with this text."""
        return (self._before + encode_basestring(text) + self._after).encode()

    def chunk(
        self, choice: Mapping[str, object], usage: Mapping[str, object] | None = None, **more: object
    ) -> bytes:
        """Return a chunk with these fields of the choice, and `more` beside the choice."""
        return self._event(choice, usage, **more).encode()

    def _event(self, choice: Mapping[str, object], usage: Mapping[str, object] | None, **more: object) -> str:
        payload: dict[str, object] = {**self._head, "choices": [{"index": self._index, **choice}], **more}
        if self._has_usage:
            payload["usage"] = usage
        return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"
