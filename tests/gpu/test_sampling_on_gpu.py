"""What is sampled on a GPU does not depend on who waits for whom, nor on where logits are adjusted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.messages import SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7, 7, 7], [9], [11, 12, 11, 12, 11, 12, 11], [3] * 12]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
RANDOM = SamplingParams(temperature=0.9, seed=17, max_tokens=24, ignore_eos=True)
ADJUSTED = dataclasses.replace(
    GREEDY,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    repetition_penalty=1.3,
    logit_bias=((0, 3.0), (20, -100.0), (198, 1.5)),
    min_tokens=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny(path, TinyModel(heads=6, kv_heads=3))
    return path


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_a_step_ahead_changes_no_token(folder: Path, sampling: SamplingParams, enforce_eager: bool) -> None:
    tokens = []
    for ahead in (False, True):
        config = make_config(folder, device="cuda", enforce_eager=enforce_eager, async_scheduling=ahead)
        with LocalEngine(config) as engine:
            tokens.append(engine.generate(PROMPTS, sampling))
            assert (engine.num_ahead > 0) == ahead
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_penalties_biases_and_least_lengths_are_those_of_a_cpu(folder: Path, temperature: float) -> None:
    sampling = dataclasses.replace(ADJUSTED, temperature=temperature, seed=3)
    tokens = []
    for device in ("cpu", "cuda"):
        with LocalEngine(make_config(folder, device=device)) as engine:
            tokens.append(engine.generate(PROMPTS, sampling))
    assert tokens[0] == tokens[1]
    assert min(map(len, tokens[0])) >= ADJUSTED.min_tokens


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_prompts_are_scored_as_on_a_cpu_and_change_no_token(folder: Path, enforce_eager: bool) -> None:
    scored = dataclasses.replace(GREEDY, prompt_logprobs=2)
    scores = {}
    for device in ("cpu", "cuda"):
        with LocalEngine(make_config(folder, device=device, enforce_eager=enforce_eager)) as engine:
            expected = engine.generate(PROMPTS, GREEDY)
            assert engine.generate(PROMPTS, [scored, GREEDY, scored, scored]) == expected
            news = [part for key in range(len(PROMPTS)) for part in engine.prompt_logprobs[key]]
            scores[device] = [value for part in news for value in (*part.logprobs, *part.top_logprobs)]
    assert len(scores["cuda"]) == sum(3 * (len(PROMPTS[key]) - 1) for key in (0, 2, 3))
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=1e-3)
