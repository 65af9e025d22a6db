"""What a request says of how its tokens are chosen. Knows nothing of how that is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tprt.errors import InvalidRequestError

MAX_LOGPROBS = 20
# Compilers take longer than in proportion; a schema of OpenAI's has 120,000 at most.
MAX_GRAMMAR_CHARS = 131_072


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must be a sentence of.

    Attributes:
        kind: the language of `source`.
        source: a JSON schema, a regular expression, or a grammar in llguidance's variant of Lark; of
            `MAX_GRAMMAR_CHARS` at most.

    Raises:
        InvalidRequestError: there is no such kind, or the source is no text or too long.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise InvalidRequestError(f"a grammar of kind {self.kind!r}; expected json_schema, regex or lark")
        if not isinstance(self.source, str):
            raise InvalidRequestError(f"a grammar whose source is {type(self.source).__name__}; expected str")
        if len(self.source) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"a grammar of {len(self.source)} characters; expected {MAX_GRAMMAR_CHARS} at most"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_whole_or_none(value: object) -> bool:
    return value is None or _is_whole(value)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_row(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple | list) and all(map(fits, value))


def _is_bias(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and _is_whole(value[0]) and _is_number(value[1])


_TypeCheck = tuple[Callable[[object], bool], str]
_WHOLE: _TypeCheck = (_is_whole, "a whole number")
_WHOLE_OR_NONE: _TypeCheck = (_is_whole_or_none, "a whole number or None")
_NUMBER: _TypeCheck = (_is_number, "a number")
# The coordinator drops what it cannot read, and whoever sent it would wait for ever.
_TYPES: dict[str, _TypeCheck] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), _NUMBER),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("top_k", "max_tokens", "min_tokens"), _WHOLE),
    **dict.fromkeys(("seed", "logprobs", "prompt_logprobs"), _WHOLE_OR_NONE),
    "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
    "stop": (lambda value: _is_row(value, lambda one: isinstance(one, str)), "strings in a tuple or list"),
    "stop_token_ids": (lambda value: _is_row(value, _is_whole), "token ids in a tuple or list"),
    "logit_bias": (lambda value: _is_row(value, _is_bias), "pairs of a token id and a number"),
    "grammar": (lambda value: value is None or isinstance(value, Grammar), "a Grammar or None"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
        temperature: 0 is greedy, as is less than 1e-5; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: drop tokens less likely than this share of the most likely one.
        seed: noise is a function of (seed, position); None draws a seed for the request.
        max_tokens: most tokens to generate.
        ignore_eos: go on past the end-of-sequence tokens of the model.
        stop: strings that end the output; they are not part of it.
        stop_token_ids: further token ids that end the output.
        logprobs: number of most likely tokens to report with each token, besides the chosen one; None: none.
        prompt_logprobs: the same for the tokens of the prompt, all but the first. What is reported is computed:
            the prefix cache is no help to it.
        presence_penalty, frequency_penalty: taken off the logit of each token of the output, once and for each
            time it is there (OpenAI's definition).
        repetition_penalty: divides the positive and multiplies the negative logits of the tokens of prompt and
            output (Keskar et al. 2019, arXiv:1909.05858); 1 leaves them.
        logit_bias: (token id, what is added to its logit).
        min_tokens: end-of-sequence tokens and `stop_token_ids` are not chosen before so many tokens, and stop
            strings that are complete within them do not count.
        grammar: the output is a sentence of it.

    Raises:
        InvalidRequestError: a value is of another type than it should be, or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, (fits, expected) in _TYPES.items():
            value = getattr(self, name)
            self._check(name, value, fits(value), expected)
        self._check_ranges()

    def _check_ranges(self) -> None:
        self._check("temperature", self.temperature, 0.0 <= self.temperature < 1e4, "from 0 to 10000")
        self._check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (all tokens) or more")
        self._check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1")
        self._check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "from 0 to 1")
        self._check("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        self._check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            self._check(name, count, count is None or 0 <= count <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._check(name, value, -2.0 <= value <= 2.0, "from -2 to 2")
        repetition_ok = 0.0 < self.repetition_penalty <= 10.0
        self._check("repetition_penalty", self.repetition_penalty, repetition_ok, "above 0, at most 10")
        biases_ok = all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias)
        self._check("logit_bias", self.logit_bias, biases_ok, "biases from -100 to 100")
        min_ok = 0 <= self.min_tokens <= self.max_tokens
        self._check("min_tokens", self.min_tokens, min_ok, f"from 0 to max_tokens, which is {self.max_tokens}")
        self._check("stop", self.stop, all(self.stop), "strings that are not empty")

    @staticmethod
    def _check(name: str, value: object, ok: bool, expected: str) -> None:
        if not ok:
            raise InvalidRequestError(f"sampling parameter {name} is {value!r}; expected {expected}")
