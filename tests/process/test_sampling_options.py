"""What the command line says of sampling reaches the ranks, and what cannot be served is refused by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import LLM, SamplingParams
from launch.config_file import load_config
from launch.generate_command import _to_grammar
from tests.process.test_generate import tprt
from tests.support.checkpoints import TinyModel
from tests.support.deployments import TinyDeployment, make_tiny_deployment
from tests.support.tokenizers import byte_tokenizer
from tprt.errors import ConfigError, InvalidRequestError
from tprt.messages import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmpdir_of_children: Path) -> Path:
    """Every test starts and ends without children, files and shared memory."""
    return tmpdir_of_children


def test_the_command_prints_what_fits_a_schema_with_penalties_beside_it(tmp_path: Path) -> None:
    talking = make_tiny_deployment(tmp_path, TinyModel(heads=9, kv_heads=3, vocab_size=300))
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    ran = tprt(
        *("generate", talking.config, "--prompt", "Name a color.", "--json", "--max-tokens", "200"),
        *("--json-schema", str(schema), "--repetition-penalty", "1.1", "--presence-penalty", "0.2"),
        *("--frequency-penalty", "0.1", "--min-tokens", "3", "--temperature", "0.7", "--seed", "3"),
        *("--set", "parallel.tensor_parallel_size=1"),
    )
    assert ran.returncode == 0, ran.stderr
    output = json.loads(ran.stdout)
    assert output["finish_reason"] == "stop"
    answer = json.loads(output["text"])
    assert answer["color"] in ("red", "green")
    assert answer["count"] in range(1, 10)


def test_a_grammar_for_a_model_without_a_tokenizer_is_refused_and_nothing_else_is(tiny: TinyDeployment) -> None:
    plain = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with LLM(load_config(tiny.config, ["parallel.tensor_parallel_size=1"])) as llm:
        with pytest.raises(InvalidRequestError, match=r"needs the model's tokenizer\.json.*: No such file"):
            llm.generate([[5, 6]], SamplingParams(grammar=Grammar("regex", "a")))
        (output,) = llm.generate([[5, 6]], plain)
    assert len(output.outputs[0].token_ids) == 3


def test_a_schema_is_given_as_itself_or_as_a_file(tmp_path: Path) -> None:
    text, file = ' {"type": "object"}', tmp_path / "schema.json"
    file.write_text(text)
    assert _to_grammar(text, None) == _to_grammar(str(file), None) == Grammar("json_schema", text)
    assert _to_grammar(None, "a+") == Grammar("regex", "a+")
    assert _to_grammar(None, None) is None
    with pytest.raises(ConfigError, match=r"--json-schema nowhere\.json cannot be read"):
        _to_grammar("nowhere.json", None)
    with pytest.raises(InvalidRequestError, match="not both"):
        _to_grammar(text, "a+")
