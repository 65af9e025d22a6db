"""The largest step is as large as the scheduler allows, and the estimate is what it takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.live_bytes import LiveBytes
from tests.unit.worker.runners import make_runner
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import SchedulerConfig
from tprt.layers import embedding, linear
from tprt.layers.attention import Attention
from tprt.sharding import make_shard_plan, shape_of
from tprt.worker.workspace import estimate_workspace, largest_step

MAX_MODEL_LEN = 512


@given(st.integers(1, 40), st.integers(0, 400), st.integers(2, 64), st.integers(1, 17))
def test_the_largest_step_is_what_the_scheduler_can_send_and_no_more(
    num_seqs: int, more_tokens: int, max_model_len: int, block_size: int
) -> None:
    scheduler = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs + more_tokens)
    step = largest_step(scheduler, max_model_len, block_size)
    assert len(step.query_lens) == step.samples.sum() == num_seqs
    assert step.query_lens.sum() == len(step.token_ids) == min(num_seqs + more_tokens, num_seqs * max_model_len)
    assert 1 <= step.query_lens.min() <= step.query_lens.max() <= max_model_len
    assert len(step.block_ids) == sum(-(-int(length) // block_size) for length in step.query_lens)
    assert not step.block_ids.any()


def write_config(folder: Path, **shape: int) -> None:
    fixed = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps({**fixed, **shape}))


WIDE_MLP = dict(
    hidden_size=64, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
WIDE_ATTENTION = WIDE_MLP | dict(intermediate_size=64, num_attention_heads=16, num_key_value_heads=8)
# Not where sampling takes most: the estimate is for GPUs, whose kernels make noise and truncate in place
# (tests/gpu/test_plan_on_gpu.py).
CASES = {
    "gate and up": (WIDE_MLP | {"vocab_size": 100}, 1024, 8),
    "heads": (WIDE_ATTENTION | {"vocab_size": 100}, 1024, 8),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_the_largest_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtype: str
) -> None:
    for module in (linear, embedding):  # a packed weight has no storage to count
        monkeypatch.setattr(module, "can_pack", lambda weight: False)
    shape, num_tokens, num_seqs = CASES[case]
    write_config(tmp_path, **shape)
    scheduler = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    runner = make_runner(tmp_path, dtype, scheduler)
    runner.load()
    with LiveBytes() as counted:
        runner.run_largest_step()
    checkpoint = read_checkpoint_config(str(tmp_path))
    (shard,) = make_shard_plan(shape_of(checkpoint), 1).shards
    estimate = estimate_workspace(checkpoint, shard, scheduler, getattr(torch, dtype), MAX_MODEL_LEN)
    assert estimate == pytest.approx(counted.peak, rel=0.1)


def test_the_largest_step_leaves_no_kv_blocks_behind(tmp_path: Path) -> None:
    write_config(tmp_path, **WIDE_MLP, vocab_size=100)
    runner = make_runner(tmp_path, "float32", SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16))
    runner.load()
    runner.run_largest_step()
    caches = [module.kv_cache for module in runner.model.modules() if isinstance(module, Attention)]
    assert np.sum([cache.numel() for cache in caches]) == 0
    assert len(caches) == 2
