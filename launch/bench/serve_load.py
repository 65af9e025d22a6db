"""What a load is made of: prompts of random tokens or words, the lengths of outputs, and when each arrives.

All of it is a function of the seed. Knows nothing of HTTP beyond the body of a request, and sends nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.bench.serve_stream import Endpoint

# Short and common, so that each is about one token whatever the tokenizer.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country hand"
    " part place case week company system program question work government number night point home water room"
    " mother area money story fact month lot right study book eye job word business issue side kind head house"
    " service friend father power hour game line end member law car city community name president team minute"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and outputs: whole numbers within `range_ratio` of each, all as likely.

    A ratio of 0 gives these lengths exactly, 0.5 half to one and a half times as much.
    """

    input_len: int
    output_len: int
    range_ratio: float = 0.0

    def draw(self, random: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Return (prompt, output) lengths of `count` requests, each at least 1."""
        prompts, outputs = (self._draw(random, length, count) for length in (self.input_len, self.output_len))
        return list(zip(prompts, outputs, strict=True))

    def _draw(self, random: np.random.Generator, length: int, count: int) -> list[int]:
        least = max(1, math.floor(length * (1 - self.range_ratio)))
        most = max(1, math.ceil(length * (1 + self.range_ratio)))
        return [int(number) for number in random.integers(least, most, count, endpoint=True)]


@dataclass(frozen=True, slots=True)
class RequestForm:
    """What all requests of a load have in common.

    Attributes:
        model: the name that the server knows it by.
        endpoint: where they go: token ids to `completions`, or text if `vocab_size` is 0; text to `chat`.
        vocab_size: prompts are drawn from the token ids below it.
        temperature: 0 is greedy.
        ignore_eos: outputs have the length that was drawn, whatever the model would say.
    """

    model: str
    endpoint: Endpoint
    vocab_size: int
    temperature: float = 0.0
    ignore_eos: bool = True

    def body(self, random: np.random.Generator, input_len: int, output_len: int) -> bytes:
        """Return the body of one request with a random prompt of `input_len` tokens, or about that in words."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_len,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": _words(random, input_len)}]
        elif self.vocab_size:
            body["prompt"] = random.integers(0, self.vocab_size, input_len).tolist()
        else:
            body["prompt"] = _words(random, input_len)
        return json.dumps(body).encode()


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(_WORDS[index] for index in random.integers(0, len(_WORDS), count).tolist())


def some_text() -> str:
    """Return text that many tokens come of."""
    return _TEXT


def arrival_times(random: np.random.Generator, count: int, rate: float, burstiness: float) -> list[float]:
    """Return when each of `count` requests arrives, in seconds from the start.

    The pauses have a gamma distribution of shape `burstiness` and mean 1 / `rate`: 1 makes a Poisson process,
    less makes bursts, more makes them even. They are stretched so that the last request arrives at `count` /
    `rate`, as `vllm bench serve` does: the rate is that with every seed. At an infinite rate all come at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    times = np.cumsum(random.gamma(burstiness, 1.0 / (rate * burstiness), count))
    # A tiny shape may draw pauses that are all too small for a number.
    scale = count / rate / times[-1] if times[-1] > 0 else 1.0
    return [float(at_s) for at_s in times * scale]
