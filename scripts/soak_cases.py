"""Prompts with the text that the model makes of them offline: what a soaked server must answer to the letter.

Greedy, and only prompts in whose output no choice is near a tie: there the order of float sums, which depends
on what else is in a batch, would decide. Knows nothing of HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.bench.serve_load import some_text
from launch.bench.serve_stream import Endpoint
from launch.llm import LLM
from tprt.messages import SamplingParams
from tprt.server.completion import Completion

# Between the log-probabilities of the best token and the next; batches differ by about 1e-5.
_LEAST_GAP = 1e-3
_MAX_PROMPT_WORDS = 40
_SPARE = 8
_SENTENCES = (
    "Tell me a short story of a {} and a {}.",
    "Why does every {} need a {}?",
    "Once upon a time there was a {} that had no {}. One day,",
    "The first thing to know about a {} is how its {}",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request and its answer.

    Attributes:
        endpoint: where it goes.
        prompt: its `prompt` (text or token ids) or `messages`.
        max_tokens: which ends it; the end of a sequence is ignored.
        text: of the answer.
    """

    endpoint: Endpoint
    prompt: Any
    max_tokens: int
    text: str

    def body(self, model: str, stream: bool) -> dict[str, Any]:
        """Return the request's body."""
        body: dict[str, Any] = {
            "model": model,
            "messages" if self.endpoint == "chat" else "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            # The checkpoint may say otherwise.
            "repetition_penalty": 1,
            "ignore_eos": True,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body


def make_cases(config: str, overrides: Sequence[str], count: int, max_tokens: int, seed: int) -> list[Case]:
    """Run the model offline on random prompts, and return the cases that are far from ties.

    Args:
        config: YAML file of the deployment.
        overrides: `section.key=value`.
        count: of cases; fewer are returned where many are near a tie.
        max_tokens: of the longest output; the others are shorter, 1 at least.
        seed: all prompts and lengths follow from it.
    """
    draw = random.Random(seed)
    with LLM(config, overrides) as llm:
        forms = [_form(draw, number, llm) for number in range(count + _SPARE)]
        lengths = [draw.randint(1, max_tokens) for _ in forms]
        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=2)
            for length in lengths
        ]
        completions = llm.run([ids for _, _, ids in forms], params, show_progress=True)
    cases = [
        Case(endpoint, prompt, length, completion.text)
        for (endpoint, prompt, _), length, completion in zip(forms, lengths, completions, strict=True)
        if _least_gap(completion) >= _LEAST_GAP and completion.text
    ]
    return cases[:count]


def _form(draw: random.Random, number: int, llm: LLM) -> tuple[Endpoint, Any, list[int]]:
    """Return the endpoint, the prompt as it is sent there, and its token ids: text, ids and chats in turns."""
    words = some_text().split()
    head = draw.choices(words, k=draw.randint(0, _MAX_PROMPT_WORDS))
    # A sentence at the end, since after words alone the model repeats one of them.
    text = " ".join([*head, draw.choice(_SENTENCES).format(*draw.choices(words, k=2))])
    if number % 3 == 0:
        messages = [{"role": "user", "content": text}]
        return "chat", messages, llm.encode_chat(messages)
    ids = llm.encode(text)
    return "completions", text if number % 3 == 1 else ids, ids


def _least_gap(completion: Completion) -> float:
    """Return how far the closest choice of the output was from another one."""
    best = [[logprob for _, logprob in token.top] for token in completion.logprobs]
    return min((first - second for first, second in best), default=0.0)
