"""Captured decode steps give the tokens of eager ones, whatever the batch and the sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tests.support.tokenizers import byte_tokenizer
from tprt.config import Config
from tprt.messages import Grammar, SamplingParams
from tprt.worker.decode_graphs import DecodeGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [[5 + index, 6, 7 + index, 8, 9][: 1 + index % 5] for index in range(7)]
SHAPES = [TinyModel("llama", 9, 3, bias=True, head_dim=16), TinyModel("qwen3", 8, 2, tied=True, head_dim=16)]
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    "random": SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True),
    "truncated": SamplingParams(temperature=0.8, seed=3, top_k=7, top_p=0.9, max_tokens=24, ignore_eos=True),
    "logprobs": SamplingParams(temperature=0.0, logprobs=3, max_tokens=24, ignore_eos=True),
    "adjusted": SamplingParams(
        temperature=0.8,
        seed=3,
        logprobs=2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((7, 2.0), (198, -100.0)),
        min_tokens=20,
        max_tokens=24,
    ),
    "grammar": SamplingParams(
        temperature=0.8, seed=3, grammar=Grammar("regex", "([a-f]{2}-){9}"), max_tokens=40, ignore_eos=True
    ),
}


def settings(folder: Path, enforce_eager: bool) -> Config:
    config = make_config(folder, device="cuda")
    runtime = config.runtime.model_copy(update={"enforce_eager": enforce_eager, "attention_backend": "triton"})
    return config.model_copy(update={"runtime": runtime})


@pytest.mark.parametrize("tiny", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_graphs_equal_eager_steps(
    tmp_path: Path, tiny: TinyModel, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, tiny)
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    with LocalEngine(settings(tmp_path, enforce_eager=True)) as engine:
        expected = engine.generate(PROMPTS, sampling)
    replayed = []
    run = DecodeGraphs.run
    monkeypatch.setattr(DecodeGraphs, "run", lambda self, step: replayed.append(step.step) or run(self, step))
    with LocalEngine(settings(tmp_path, enforce_eager=False)) as engine:
        assert engine.generate(PROMPTS, sampling) == expected
        # Slots and blocks that other sequences had before.
        assert engine.generate(PROMPTS[::-1], sampling) == expected[::-1]
    assert len(replayed) > 30
