"""Which tokens a grammar lets through, for tokenizers and models of any size, and how it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support.tokenizers import EOS, letters_tokenizer
from tprt.coordinator import grammar as grammar_module
from tprt.coordinator.grammar import GrammarCompiler, GrammarState, forbid_tokens
from tprt.errors import InvalidRequestError
from tprt.messages import MAX_GRAMMAR_CHARS, Grammar

LETTERS = [EOS, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"]
END = 0


def compiler(vocab_size: int = len(LETTERS), eos_token_ids: tuple[int, ...] = (END,)) -> GrammarCompiler:
    return GrammarCompiler(lambda: letters_tokenizer(LETTERS), eos_token_ids, vocab_size)


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def names(mask: np.ndarray) -> str:
    """Return the letters in a mask, and a dot for the end."""
    bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return "".join(LETTERS[bit] if bit != END else "." for bit in bits.tolist())


def after(states: list[GrammarState]) -> list[str]:
    return [names(mask) for mask in states[0].compiler.masks(states)]


def test_each_state_has_its_own_place_in_its_own_grammar() -> None:
    grammars = compiler()
    states = [grammars.start(Grammar("regex", regex)) for regex in ("ab?c", "ab?c", "[x-z]+", "q")]
    assert after(states) == ["a", "a", "xyz", "q"]
    states[0].take(ids("a"))
    states[2].take(ids("zy"))
    assert after(states) == ["bc", "a", ".xyz", "q"]
    states[0].take(ids("b"))
    states[0].take(ids("c"))
    assert after(states[:2]) == [".", "a"]


def test_only_the_end_follows_a_complete_sentence_however_often_it_comes() -> None:
    state = compiler().start(Grammar("regex", "ab"))
    state.take(ids("ab"))
    for _ in range(3):
        assert after([state]) == ["."]
        state.take([END])
    assert state.error == ""


def test_any_of_several_end_tokens_may_follow() -> None:
    state = compiler(eos_token_ids=(END, *ids("N"))).start(Grammar("regex", "a|b"))
    assert after([state]) == ["ab"]
    state.take(ids("b"))
    assert after([state]) == [".N"]


@pytest.mark.parametrize("vocab_size", [41, 63, 64, 65, 200])
def test_tokens_that_only_the_model_has_are_impossible(vocab_size: int) -> None:
    (mask,) = compiler(vocab_size).masks([compiler(vocab_size).start(Grammar("regex", "(?s:.*)"))])
    assert len(mask) == -(-vocab_size // 32)
    assert names(mask) == "." + "".join(LETTERS[1:])


@pytest.mark.parametrize("vocab_size", [20, 32, 33])
def test_tokens_that_only_the_tokenizer_has_are_impossible(vocab_size: int) -> None:
    (mask,) = compiler(vocab_size).masks([compiler(vocab_size).start(Grammar("regex", "[a-zA-N]*"))])
    assert len(mask) == -(-vocab_size // 32)
    assert names(mask) == "." + "".join(LETTERS[1:vocab_size])


def test_a_grammar_that_needs_a_token_that_the_model_lacks_has_failed() -> None:
    grammars = compiler(20)
    state = grammars.start(Grammar("regex", "aN"))
    state.take(ids("a"))
    assert after([state]) == ["."]
    assert state.error == "no token of the model can follow"


def test_a_token_that_does_not_fit_is_an_error_without_the_parsers_state() -> None:
    grammars = compiler()
    state, other = grammars.start(Grammar("regex", "abc")), grammars.start(Grammar("regex", "abc"))
    state.take(ids("ax"))
    assert "doesn't satisfy the grammar" in state.error
    assert "\n" not in state.error
    assert after([state, other]) == [".", "a"]


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("lark", "start: nowhere"), 'unknown name: "nowhere"'),
        (Grammar("json_schema", "{"), "EOF"),
        (Grammar("json_schema", '{"type": "text"}'), "Invalid type: text"),
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_compiled_is_refused_in_the_compilers_words(
    grammar: Grammar, said: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiler().start(grammar)
    assert str(caught.value).startswith(f"the grammar ({grammar.kind}) cannot be used: ")
    assert said in str(caught.value)


def test_a_tokenizer_that_is_none_is_refused_and_read_again_the_next_time() -> None:
    texts = ["{}", letters_tokenizer(LETTERS)]
    grammars = GrammarCompiler(lambda: texts.pop(0), (END,), len(LETTERS))
    with pytest.raises(InvalidRequestError, match="tokenizer cannot be used for grammars"):
        grammars.start(Grammar("regex", "a"))
    assert after([grammars.start(Grammar("regex", "a"))]) == ["a"]


def test_a_model_without_an_end_token_has_no_grammars() -> None:
    with pytest.raises(InvalidRequestError, match="no end-of-sequence token"):
        compiler(eos_token_ids=()).start(Grammar("regex", "a"))


def test_the_tokenizer_is_read_once_and_equal_grammars_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, texts = [], [letters_tokenizer(LETTERS)]
    real = grammar_module._compile

    def compile_(tokenizer: object, grammar: Grammar) -> object:
        compiled.append(grammar.source)
        return real(tokenizer, grammar)

    monkeypatch.setattr(grammar_module, "_compile", compile_)
    monkeypatch.setattr(grammar_module, "_MAX_COMPILED", 2)
    grammars = GrammarCompiler(texts.pop, (END,), len(LETTERS))
    for regex in "abacabc":
        assert after([grammars.start(Grammar("regex", regex))]) == [regex]
    # Of two that are kept, the one used last stays.
    assert compiled == ["a", "b", "c", "b", "c"]


def test_forbidden_tokens_are_taken_out_of_a_mask_unless_nothing_else_is_in_it() -> None:
    def mask_of(token_ids: list[int]) -> np.ndarray:
        return np.packbits(np.isin(np.arange(64), token_ids), bitorder="little").view(np.int32)

    mask = mask_of([0, 5, 31, 32, 63])
    forbid_tokens(mask, np.array([5, 31, 31, 40, 63], np.int32))
    assert mask.tolist() == mask_of([0, 32]).tolist()
    forbid_tokens(mask, np.array([0, 32], np.int32))
    assert mask.tolist() == mask_of([0, 32]).tolist()


def test_end_tokens_that_the_model_does_not_have_are_passed_over() -> None:
    mask = np.array([-1], np.int32)
    forbid_tokens(mask, np.array([3, 32, 5000], np.int32))
    assert mask.view(np.uint32).tolist() == [0xFFFFFFFF - 8]


def _chain_of_rules(length: int) -> Grammar:
    rules = [f"r{i}: r{i + 1} r{i + 1}" for i in range(length)]
    return Grammar("lark", "\n".join(["start: r0", *rules, f'r{length}: "a"']))


def _chain_of_schemas(length: int) -> Grammar:
    schemas = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    source = {"$defs": {**schemas, f"d{length}": {"enum": ["a"]}}, "$ref": "#/$defs/d0"}
    return Grammar("json_schema", json.dumps(source))


@pytest.mark.parametrize("grammar", [_chain_of_rules(6500), _chain_of_schemas(2700)], ids=["rules", "schemas"])
def test_thousands_of_rules_that_name_each_other_do_not_end_the_process(grammar: Grammar) -> None:
    assert len(grammar.source) > 0.9 * MAX_GRAMMAR_CHARS
    grammars = compiler()
    try:
        states = [grammars.start(grammar), grammars.start(grammar)]
    except InvalidRequestError:
        return
    grammars.masks(states)


def test_a_source_that_is_too_long_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="a grammar of 131073 characters; expected 131072 at most"):
        Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1))
