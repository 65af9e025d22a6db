"""Log-probabilities of prompt tokens are transformers' own, and change nothing of what runs beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.support.checkpoints import TinyModel, reference_logits, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.messages import StepInput

PROMPT = [5 + index * 7 % 190 for index in range(30)]
OTHER = [42, 43, 44]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save_tiny(folder, TinyModel(heads=6, kv_heads=3))


def make_step() -> StepInput:
    """Return a step of two prompts, of which the first is a chunk: nothing is sampled from it."""
    lens = np.array([len(PROMPT), len(OTHER)], np.int32)
    return StepInput(
        epoch=0,
        step=0,
        num_decodes=0,
        seq_slots=np.arange(2, dtype=np.int32),
        query_lens=lens,
        context_lens=lens,
        token_ids=np.array(PROMPT + OTHER, np.int32),
        block_ids=np.arange(9, dtype=np.int32),
        samples=np.array([0, 1], np.uint8),
        temperatures=np.zeros(2, np.float32),
        top_ks=np.zeros(2, np.int32),
        top_ps=np.ones(2, np.float32),
        min_ps=np.zeros(2, np.float32),
        seeds=np.zeros(2, np.int64),
        num_logprobs=np.full(2, -1, np.int32),
    )


def test_a_rank_computes_the_rows_that_a_step_names(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    plain, rows = make_step(), list(range(3, len(PROMPT) - 1))
    assert len(rows) > 2 * 8, "more than two parts of max_num_seqs"
    step = dataclasses.replace(
        plain,
        step=1,
        prompt_rows=np.array(rows, np.int32),
        prompt_row_targets=np.array(PROMPT[4:], np.int32),
        num_prompt_top=2,
    )
    with LocalEngine(make_config(folder)) as engine:
        (runner,) = engine.runners
        without, output = runner.execute(plain), runner.execute(step)
    assert output.token_ids.tolist() == without.token_ids.tolist()
    assert len(without.prompt_logprobs) == 0
    expected = reference_logits(model, PROMPT)[rows].log_softmax(dim=-1)
    chosen = expected.gather(1, torch.tensor(PROMPT[4:]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.from_numpy(output.prompt_logprobs), chosen, atol=1e-4, rtol=0)
    best = expected.topk(2)
    found = torch.from_numpy(output.prompt_top_logprobs).view(-1, 2)
    torch.testing.assert_close(found, best.values, atol=1e-4, rtol=0)
    assert output.prompt_top_token_ids.tolist() == best.indices.ravel().tolist()
    assert output.num_prompt_top == 2


def test_a_step_of_nothing_but_a_chunk_brings_its_rows(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    step = dataclasses.replace(
        make_step(),
        samples=np.zeros(2, np.uint8),
        prompt_rows=np.array([30, 31], np.int32),
        prompt_row_targets=np.array(OTHER[1:], np.int32),
    )
    with LocalEngine(make_config(folder)) as engine:
        output = engine.runners[0].execute(step)
    assert len(output.token_ids) == 0
    assert len(output.prompt_logprobs) == 2
    assert (output.prompt_logprobs < 0).all()
    assert len(output.prompt_top_token_ids) == len(output.prompt_top_logprobs) == output.num_prompt_top == 0
