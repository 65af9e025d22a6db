"""Outputs under a grammar are sentences of it, whatever the model would rather say."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest
from tokenizers import Tokenizer

from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tests.support.tokenizers import byte_tokenizer
from tprt.errors import InvalidRequestError
from tprt.messages import Grammar, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "ü"]}, "maxItems": 3},
        "is_new": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
# Most of a random model's tokens between those of JSON would be spaces.
FEW_SPACES = -3.0
EOS = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random model that has more tokens than its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, TinyModel(heads=6, kv_heads=3, vocab_size=300))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LocalEngine]:
    config = make_config(folder, 2, num_blocks=2000)
    many = config.scheduler.model_copy(update={"max_num_seqs": 40})
    with LocalEngine(config.model_copy(update={"scheduler": many})) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(byte_tokenizer())


def samplings(
    grammar: Grammar, count: int, tokenizer: Tokenizer, max_tokens: int = 200
) -> list[SamplingParams]:
    spaces = tuple((tokenizer.encode(space).ids[0], FEW_SPACES) for space in " \n\r\t")
    plain = SamplingParams(max_tokens=max_tokens, grammar=grammar, logit_bias=spaces)
    return [dataclasses.replace(plain, temperature=0.25 * (i % 5), seed=i) for i in range(count)]


def generate(engine: LocalEngine, tokenizer: Tokenizer, wanted: list[SamplingParams]) -> list[str]:
    """Return the texts of complete outputs, which end with the end token and have it nowhere else."""
    outputs = engine.generate([[1, 2, 3 + i % 7] for i in range(len(wanted))], wanted)
    for tokens in outputs:
        assert tokens.index(EOS) == len(tokens) - 1
    return [tokenizer.decode(tokens[:-1]) for tokens in outputs]


def test_eighty_outputs_fit_their_schema(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    texts = generate(engine, tokenizer, samplings(JSON, 80, tokenizer))
    assert len(set(texts)) > 40
    for text in texts:
        jsonschema_rs.validate(SCHEMA, json.loads(text))


def test_any_json_object_is_one(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    wanted = samplings(Grammar("json_schema", '{"type": "object"}'), 8, tokenizer, max_tokens=30)
    for tokens in engine.generate([[1]] * 8, wanted):
        assert tokenizer.decode(tokens).lstrip().startswith("{")


@pytest.mark.parametrize("regex", [r"[0-9]{3}-[a-f]{1,9}\.", "äh?|öh{2,5}x", "([a-z]y ){1,3}!"])
def test_a_regular_expression_matches_the_whole_output(
    engine: LocalEngine, tokenizer: Tokenizer, regex: str
) -> None:
    for text in generate(engine, tokenizer, samplings(Grammar("regex", regex), 10, tokenizer)):
        assert re.fullmatch(regex, text), text


def test_a_lark_grammar_holds(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    grammar = Grammar(
        "lark", 'start: "(" sum ")" | sum\nsum: NUMBER ("+" NUMBER)? ("-" NUMBER)?\nNUMBER: /[1-9][0-9]{0,2}/'
    )
    for text in generate(engine, tokenizer, samplings(grammar, 10, tokenizer)):
        assert isinstance(eval(text, {}), int)


def test_a_choice_is_one_of_those_offered(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    choices = {"yes", "no", "not at all"}
    grammar = Grammar("lark", 'start: "yes" | "no" | "not at all"')
    texts = generate(engine, tokenizer, samplings(grammar, 40, tokenizer))
    assert set(texts) == choices


def test_ranks_company_preemption_and_steps_in_flight_change_nothing(
    engine: LocalEngine, folder: Path, tokenizer: Tokenizer
) -> None:
    wanted = samplings(JSON, 6, tokenizer)
    wanted[4] = dataclasses.replace(wanted[4], grammar=None, max_tokens=40, ignore_eos=True)
    prompts = [[1, 2, 3 + i % 7] for i in range(6)]
    expected = engine.generate(prompts, wanted)
    assert engine.scheduler.counters.num_preemptions == 0
    for world_size, num_blocks, ahead in ((1, 600, True), (3, 60, True), (1, 60, False)):
        config = make_config(folder, world_size, num_blocks=num_blocks, async_scheduling=ahead)
        with LocalEngine(config) as other:
            assert other.generate(prompts, wanted) == expected
            assert (other.scheduler.counters.num_preemptions > 0) == (num_blocks == 60)
    alone = [engine.generate([prompt], each)[0] for prompt, each in zip(prompts, wanted, strict=True)]
    assert alone == expected


def test_a_complete_sentence_ends_before_the_least_length_but_an_optional_end_waits_for_it(
    engine: LocalEngine, tokenizer: Tokenizer
) -> None:
    least = dataclasses.replace(samplings(JSON, 1, tokenizer)[0], min_tokens=12)
    fixed, growing = Grammar("regex", "abc"), Grammar("regex", "a+")
    outputs = engine.generate([[1], [1]], [dataclasses.replace(least, grammar=g) for g in (fixed, growing)])
    assert tokenizer.decode(outputs[0][:-1]) == "abc"
    assert len(outputs[1]) > 12


def test_a_grammar_that_cannot_be_used_harms_its_own_request_alone(
    engine: LocalEngine, tokenizer: Tokenizer
) -> None:
    for bad in (Grammar("regex", "("), Grammar("lark", "start: nothing"), Grammar("json_schema", "[")):
        with pytest.raises(InvalidRequestError, match=rf"the grammar \({bad.kind}\) cannot be used: "):
            engine.generate([[1]], SamplingParams(grammar=bad))
    assert generate(engine, tokenizer, samplings(Grammar("regex", "xy"), 3, tokenizer)) == ["xy"] * 3
