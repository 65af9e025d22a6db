"""One request as its client sees it: tokens so far, their text, and whether a stop string has come.

Stop strings are found here, where text is, and not in the coordinator, which knows token ids only. Knows
nothing of transport.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tprt.messages import FinishReason, SamplingParams
from tprt.server.tokenizer import TextStream, Tokenizer

FinishName = Literal["stop", "length", "abort"]
FINISH_NAMES: dict[FinishReason, FinishName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a chosen token, and those of the most likely ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Completion:
    """The state of one request.

    Attributes:
        prompt_token_ids: what was sent.
        sampling: how it is generated.
        token_ids: tokens so far, end-of-sequence token included.
        text: their text so far, special tokens and the stop string left out; empty without a tokenizer.
        finish_reason: None while it runs.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        logprobs: one entry per token when asked for.
    """

    prompt_token_ids: list[int]
    sampling: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishName | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None
    _stream: TextStream | None = None

    @property
    def finished(self) -> bool:
        """True once no more tokens come, for whatever reason."""
        return self.finish_reason is not None or self.error is not None

    def append(self, token_id: int, tokenizer: Tokenizer | None) -> None:
        """Take the next token; ends the completion when its text completes a stop string."""
        self.token_ids.append(token_id)
        if tokenizer is None:
            return
        if self._stream is None:
            self._stream = tokenizer.decode_stream()
        piece = self._stream.step(token_id)
        searched_from = len(self.text)
        self.text += piece
        if piece and self.sampling.stop:
            self._cut_at_stop(searched_from)

    def finish(self, reason: FinishReason, tokenizer: Tokenizer | None) -> None:
        """End the completion; text that waited for the rest of a character is given as it is."""
        if self.finished or reason == FinishReason.NONE:
            return
        if tokenizer is not None:
            rest = tokenizer.decode(self.token_ids)
            if rest.startswith(self.text):
                self.text = rest
        self.finish_reason = FINISH_NAMES[reason]

    def _cut_at_stop(self, searched_from: int) -> None:
        """Find the first stop string that ends in the newest text."""
        longest = max(map(len, self.sampling.stop))
        window = max(0, searched_from - longest + 1)
        found = [at for stop in self.sampling.stop if (at := self.text.find(stop, window)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"
