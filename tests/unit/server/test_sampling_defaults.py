"""What a request leaves out is as the checkpoint recommends, and what cannot be followed is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.options import chosen_sampling
from launch.serving.entry import make_context
from tests.support.fake_server import FakeServer, fake_server
from tprt.config import Config, ModelConfig
from tprt.errors import CheckpointError
from tprt.messages import SamplingParams
from tprt.server.sampling_defaults import SamplingDefaults, read_sampling_defaults
from tprt.server.tokenizer import Tokenizer

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [151645, 151643]}


def model(folder: Path, content: object, generation_config: Any = "auto") -> ModelConfig:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return ModelConfig(path=str(folder), generation_config=generation_config)


def read(folder: Path, **content: object) -> SamplingDefaults:
    return read_sampling_defaults(model(folder, content))


def test_a_checkpoint_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    plain = SamplingDefaults()
    assert read_sampling_defaults(ModelConfig(path=str(tmp_path / "nowhere"))) == plain
    assert read(tmp_path, eos_token_id=[2, 0], max_new_tokens=2048, temperature=None, top_k=None) == plain
    assert plain.changes() == ""
    unsaid = SamplingParams()
    assert plain == SamplingDefaults(
        unsaid.temperature, unsaid.top_k, unsaid.top_p, unsaid.min_p, unsaid.repetition_penalty
    )


def test_what_the_checkpoint_recommends_is_the_default_unless_it_is_not_to_count(tmp_path: Path) -> None:
    defaults = read_sampling_defaults(model(tmp_path, QWEN3))
    assert defaults == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert defaults.changes() == "temperature=0.6, top_k=20, top_p=0.95"
    assert read(tmp_path, min_p=0.1, repetition_penalty=1.05, top_p=1) == SamplingDefaults(
        min_p=0.1, repetition_penalty=1.05
    )
    assert read_sampling_defaults(model(tmp_path, QWEN3, "tprt")) == SamplingDefaults()


@pytest.mark.parametrize("everything", [0, -1])
def test_zero_and_minus_one_keep_all_tokens(tmp_path: Path, everything: int) -> None:
    assert read(tmp_path, top_k=everything).top_k == 0


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False).temperature == 0.0
    assert read(tmp_path, do_sample=False, temperature=0.7).temperature == 0.0
    assert read(tmp_path, do_sample=True).temperature == 1.0


def test_a_command_line_is_greedy_where_neither_it_nor_the_checkpoint_says_how(tmp_path: Path) -> None:
    assert chosen_sampling(model(tmp_path, {}), temperature=None) == SamplingDefaults(temperature=0.0)
    assert chosen_sampling(model(tmp_path, {"do_sample": True}), temperature=None).temperature == 1.0
    some = chosen_sampling(model(tmp_path, QWEN3), temperature=None, top_k=0, top_p=None)
    assert some == SamplingDefaults(temperature=0.6, top_k=0, top_p=0.95)
    assert chosen_sampling(model(tmp_path, QWEN3), temperature=0.0).temperature == 0.0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"temperature": -1}, "temperature is -1.0; expected from 0 to 10000"),
        ({"temperature": "0.6"}, "temperature is '0.6'; expected a number, or null"),
        ({"temperature": float("nan")}, "temperature is nan; expected from 0"),
        ({"top_p": 0}, "top_p is 0.0; expected above 0, at most 1"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number, or null"),
        ({"min_p": True}, "min_p is True; expected a number, or null"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; expected above 0"),
        ({"do_sample": "no"}, "do_sample is 'no'; expected true or false"),
        ([], "holds list; expected a JSON object"),
    ],
)
def test_what_is_no_sampling_parameter_is_refused_with_the_way_around_it(
    tmp_path: Path, content: object, problem: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        read_sampling_defaults(model(tmp_path, content))
    assert str(error.value).startswith(str(tmp_path / "generation_config.json"))
    assert problem in str(error.value)
    if content:
        assert "model.generation_config=tprt" in str(error.value)
    assert read_sampling_defaults(model(tmp_path, content, "tprt")) == SamplingDefaults()


def sampling_of_last(server: FakeServer) -> SamplingParams:
    sampling = server.engine.submitted[-1][1]
    assert isinstance(sampling, SamplingParams)
    return sampling


def test_a_request_has_the_checkpoints_defaults_but_for_what_it_says(byte_tokenizer: Tokenizer) -> None:
    defaults = SamplingDefaults(0.6, 20, 0.95, 0.1, 1.05)
    expected = SamplingParams(0.6, 20, 0.95, 0.1, max_tokens=9, repetition_penalty=1.05)
    plain = {"temperature": 1, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    with fake_server(byte_tokenizer, sampling_defaults=defaults) as server:
        for ask in (server.chat, lambda **fields: server.complete(prompt="Go on", **fields)):
            ask(max_tokens=9)
            assert sampling_of_last(server) == expected
            ask(max_tokens=9, temperature=None, top_k=7)
            assert sampling_of_last(server) == replace(expected, top_k=7)
            ask(max_tokens=9, **plain)
            assert sampling_of_last(server) == SamplingParams(max_tokens=9)
            ask(max_tokens=9, temperature=0)
            assert sampling_of_last(server).temperature == 0.0


def test_the_server_reads_them_from_the_folder_of_its_model(tmp_path: Path) -> None:
    context = make_context(Config(model=model(tmp_path, QWEN3)), tmp_path, ())
    context.engine.close()
    assert context.sampling_defaults == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
