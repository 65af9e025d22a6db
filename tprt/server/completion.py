"""One request as its client sees it: tokens so far, their text, and whether a stop string has come.

Stop strings are found here, where text is, and not in the coordinator, which knows token ids only. Knows
nothing of transport.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tprt.messages import FinishReason, PromptLogprobs, SamplingParams
from tprt.server.stop_strings import StopStrings
from tprt.server.text_streams import TextStream
from tprt.server.tokenizer import Tokenizer

FinishName = Literal["stop", "length", "abort"]
FINISH_NAMES: dict[FinishReason, FinishName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token that is there, and those of the most likely ones, best first."""

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
        finish_reason: None while it runs.
        stop_reason: the stop string that ended it, if one did.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        queue_s: how long it waited in the engine before it first ran; None before its first token.
        logprobs: one entry per token when asked for.
        prompt_parts: what has come of the prompt when it was asked for, all before the first token.
        error: why it was refused or lost, if it was.
        was_lost: the engine has failed it, and the request itself may be served by another.
    """

    prompt_token_ids: list[int]
    sampling: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishName | None = None
    stop_reason: str | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_parts: list[PromptLogprobs] = field(default_factory=list)
    error: str | None = None
    was_lost: bool = False
    _stream: TextStream | None = None
    _stops: StopStrings | None = None
    _released: list[str] = field(default_factory=list)
    _num_taken: int = 0

    def __post_init__(self) -> None:
        if self.sampling.stop:
            self._stops = StopStrings(self.sampling.stop)

    @property
    def finished(self) -> bool:
        """True once no more tokens come, for whatever reason."""
        return self.finish_reason is not None or self.error is not None

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """One entry for each token of the prompt but the first, as far as they have come.

        Made anew each time, which takes some microseconds a token.
        """
        token_ids = iter(self.prompt_token_ids[1:])
        return [entry for part in self.prompt_parts for entry in _entries(part, token_ids)]

    @property
    def text(self) -> str:
        """The text so far, without special tokens and the stop string; empty without a tokenizer.

        Put together anew each time; `take_text` is for those who want it as it grows.
        """
        return "".join(self._released) + (self._stops.held if self._stops is not None else "")

    def take_text(self) -> str:
        """Return the text that was released since the last call.

        What may be the beginning of a stop string is held back until it is known not to be, or the end.
        """
        if self.error is not None:
            self._release()
        taken, self._num_taken = self._num_taken, len(self._released)
        return "".join(self._released[taken:])

    def append(self, token_id: int, tokenizer: Tokenizer | None, ends_output: bool = False) -> None:
        """Take the next token; ends the completion when its text completes a stop string.

        One that is there to end the output, as `ends_output` tells, has no text, whatever its name.
        """
        self.token_ids.append(token_id)
        if tokenizer is None or ends_output:
            return
        if self._stream is None:
            self._stream = tokenizer.decode_stream()
        self._take(self._stream.step(token_id))

    def finish(self, reason: FinishReason, tokenizer: Tokenizer | None) -> None:
        """End the completion; a character that was cut short is given as it is."""
        if self.finished or reason == FinishReason.NONE:
            return
        if self._stream is not None:
            self._take(self._stream.finish())
        if self.finish_reason is None:
            self._release()
            self.finish_reason = FINISH_NAMES[reason]

    def lose(self, cause: str) -> None:
        """End the completion, whose engine has failed of `cause`."""
        self.error, self.was_lost = cause, True

    def _take(self, piece: str) -> None:
        """Look for stop strings in the next piece of text, and release what is before them."""
        if self._stops is not None:
            piece = self._stops.feed(piece, len(self.token_ids) > self.sampling.min_tokens)
            if self._stops.found is not None:
                self.stop_reason = self._stops.found
                self.finish_reason = "stop"
        if piece:
            self._released.append(piece)

    def _release(self) -> None:
        if self._stops is not None and (held := self._stops.release()):
            self._released.append(held)


def _entries(part: PromptLogprobs, token_ids: Iterator[int]) -> Iterator[TokenLogprobs]:
    """Yield the entries of the next tokens of a prompt."""
    shape = (len(part.logprobs), part.num_top)
    top_ids = part.top_token_ids.reshape(shape).tolist()
    top_values = part.top_logprobs.reshape(shape).tolist()
    for value, ids, values in zip(part.logprobs.tolist(), top_ids, top_values, strict=True):
        yield TokenLogprobs(next(token_ids), value, tuple(zip(ids, values, strict=True)))
