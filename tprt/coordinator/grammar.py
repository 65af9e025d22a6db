"""Grammars: which tokens may come next in an output that must be a sentence of one.

One compiler for each engine, made from the tokenizer's tokens, and one matcher for each sequence; llguidance
(Moskal et al., github.com/guidance-ai/llguidance) does the parsing, and is loaded with the first grammar. Knows
nothing of scheduling, and of where the tokenizer comes from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tprt.deep_stack import call_on_deep_stack
from tprt.errors import InvalidRequestError
from tprt.messages import Grammar, Int32Array

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# The same schema comes with many requests; a compiled one is copied in microseconds.
_MAX_COMPILED = 64
# Between the tokens of JSON: enough to indent, but not without end, which small models are prone to.
_JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
_WORD_BITS = 32


class GrammarCompiler:
    """The grammars of one engine."""

    def __init__(
        self, read_tokenizer: Callable[[], str], eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        """Assign only.

        Args:
            read_tokenizer: returns the text of tokenizer.json; raises `InvalidRequestError` if there is none.
            eos_token_ids: what ends an output; one of them follows a complete sentence.
            vocab_size: tokens of the model, which may be more than the tokenizer's.
        """
        self._read_tokenizer = read_tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def start(self, grammar: Grammar) -> GrammarState:
        """Return the beginning of an output.

        Raises:
            InvalidRequestError: the grammar cannot be compiled, or not for this model.
        """
        matcher = self._compiled.get(grammar)
        if matcher is None:
            tokenizer = self._tokenizer
            # It recurses through rules that name each other, thousands of which fit into a source.
            matcher = self._compiled[grammar] = call_on_deep_stack(lambda: _compile(tokenizer, grammar))
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return GrammarState(self, matcher.deep_copy())

    def masks(self, states: Sequence[GrammarState]) -> Int32Array:
        """Return the tokens that may follow each of `states`, `[G, W]`: a bit for each token of the model.

        Only the end-of-sequence tokens follow a complete sentence, and a state that has failed.
        """
        masks = np.zeros((len(states), -(-self._tokenizer.vocab_size // _WORD_BITS)), np.int32)
        self._fill([(state.matcher, row) for row, state in enumerate(states) if not state.error], masks)
        masks = self._fitted(masks)
        for row, state in enumerate(states):
            state.note_error()
            if not state.error and not masks[row].any():
                state.error = "no token of the model can follow"
            if state.error:
                masks[row] = self._eos_mask
        return masks

    def _fill(self, matchers: list[tuple[Any, int]], masks: Int32Array) -> None:
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0][0], masks, matchers[0][1])
        elif matchers:
            fill_next_token_bitmask_par(self._executor, matchers, masks)

    def _fitted(self, masks: Int32Array) -> Int32Array:
        """Cut masks of the tokenizer's tokens, or add zeros, to those of the model."""
        fitted = np.zeros((len(masks), -(-self._vocab_size // _WORD_BITS)), np.int32)
        common = min(masks.shape[1], fitted.shape[1])
        fitted[:, :common] = masks[:, :common]
        if beyond := -self._vocab_size % _WORD_BITS:
            fitted[:, -1] &= np.int32((1 << (_WORD_BITS - beyond)) - 1)
        return fitted

    @cached_property
    def _eos_mask(self) -> Int32Array:
        mask = np.zeros(-(-self._vocab_size // _WORD_BITS), np.int32)
        words, bits = _words_and_bits(mask, np.array(self._eos_token_ids, np.int32))
        np.bitwise_or.at(mask.view(np.uint32), words, bits)
        return mask

    @cached_property
    def _executor(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor()

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        if not self._eos_token_ids:
            raise InvalidRequestError("the model has no end-of-sequence token, with which a grammar must end")
        text = self._read_tokenizer()
        try:
            return LLTokenizer(text, eos_token=list(self._eos_token_ids))
        except ValueError as error:
            raise InvalidRequestError(f"this model's tokenizer cannot be used for grammars: {error}") from error


class GrammarState:
    """Where one output is in its grammar.

    Attributes:
        compiler: who made it, and makes its masks.
        matcher: llguidance's own.
        error: why it cannot go on; empty while it can.
    """

    def __init__(self, compiler: GrammarCompiler, matcher: Any) -> None:
        self.compiler = compiler
        self.matcher = matcher
        self.error = ""

    def take(self, token_ids: list[int]) -> None:
        """Go on with more tokens of the output; what follows its end is not looked at."""
        for token_id in token_ids:
            if self.error or self.matcher.is_stopped():
                return
            self.matcher.consume_token(token_id)
            self.note_error()

    def note_error(self) -> None:
        """Take over an error of the matcher, which never leaves it."""
        if not self.error and self.matcher.is_error():
            # Without the state of the parser, which comes after it.
            self.error = self.matcher.get_error().partition("<state>")[0].strip()


def forbid_tokens(mask: Int32Array, token_ids: Int32Array) -> None:
    """Take `token_ids` out of a mask `[W]`, in place, unless nothing else is in it."""
    allowed = mask.copy()
    words, bits = _words_and_bits(mask, token_ids)
    np.bitwise_and.at(allowed.view(np.uint32), words, ~bits)
    if allowed.any():
        mask[:] = allowed


def _words_and_bits(mask: Int32Array, token_ids: Int32Array) -> tuple[Int32Array, NDArray[np.uint32]]:
    """Return where tokens are in a mask; a config may name end tokens that the model does not have."""
    there = token_ids[token_ids < _WORD_BITS * len(mask)]
    return there // _WORD_BITS, np.left_shift(np.uint32(1), (there % _WORD_BITS).astype(np.uint32))


def _compile(tokenizer: Any, grammar: Grammar) -> Any:
    """Return the matcher of a grammar at its beginning.

    Raises:
        InvalidRequestError: in llguidance's own words.
    """
    from llguidance import LLMatcher

    try:
        if grammar.kind == "json_schema":
            options: JsonCompileOptions = {"whitespace_pattern": _JSON_WHITESPACE}
            source = LLMatcher.grammar_from_json_schema(grammar.source, defaults=options)
        elif grammar.kind == "regex":
            source = LLMatcher.grammar_from_regex(grammar.source)
        else:
            source = LLMatcher.grammar_from_lark(grammar.source)
        matcher = LLMatcher(tokenizer, source, log_level=0)
        error = matcher.get_error()
    except ValueError as failure:
        error = str(failure)
    if error:
        raise InvalidRequestError(f"the grammar ({grammar.kind}) cannot be used: {error.strip()}")
    return matcher
