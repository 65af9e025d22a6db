"""What a step takes besides weights and KV blocks: the largest step, to measure it, and a formula to plan it.

Knows nothing of devices. The formula follows the tensors of `tprt.models.decoder` and `tprt.layers.sampler`
that live at the same time; kernels that allocate on their own are not in it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tprt.checkpoint_config import CheckpointConfig
from tprt.config import SchedulerConfig
from tprt.messages import MAX_LOGPROBS, Int32Array, StepInput
from tprt.sharding import RankShard

# Per token of a step: its id, its position and its KV slot.
_INPUT_BYTES = 3 * torch.int64.itemsize


def largest_step(scheduler: SchedulerConfig, max_model_len: int, block_size: int) -> StepInput:
    """Return a step of as many tokens and sampled sequences as the scheduler can send.

    All tokens are prompt tokens that attend to their own sequence alone, and all of them are written to KV
    block 0, so a KV cache of one block is enough to run it. Sampling is of the kind that takes most.
    """
    num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    num_tokens = min(scheduler.max_num_batched_tokens, num_seqs * max_model_len)
    lens = np.full(num_seqs, num_tokens // num_seqs, np.int32)
    lens[: num_tokens % num_seqs] += 1
    return replace(
        prompt_step(lens, block_size),
        temperatures=np.ones(num_seqs, np.float32),
        top_ps=np.full(num_seqs, 0.5, np.float32),
        num_logprobs=np.full(num_seqs, MAX_LOGPROBS, np.int32),
    )


def prompt_step(query_lens: Int32Array, block_size: int, num_cached: int = 0) -> StepInput:
    """Return a greedy step of prompts of `query_lens` `[S]` tokens, each behind `num_cached` that are computed.

    All tokens are 0, and all KV blocks are number 0.
    """
    num_seqs, context_lens = len(query_lens), query_lens + np.int32(num_cached)
    return StepInput(
        epoch=0,
        step=0,
        num_decodes=0,
        seq_slots=np.arange(num_seqs, dtype=np.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        token_ids=np.zeros(int(query_lens.sum()), np.int32),
        block_ids=np.zeros(int((-(-context_lens // block_size)).sum()), np.int32),
        samples=np.ones(num_seqs, np.uint8),
        temperatures=np.zeros(num_seqs, np.float32),
        top_ks=np.zeros(num_seqs, np.int32),
        top_ps=np.ones(num_seqs, np.float32),
        min_ps=np.zeros(num_seqs, np.float32),
        seeds=np.zeros(num_seqs, np.int64),
        num_logprobs=np.full(num_seqs, -1, np.int32),
    )


def rotary_table_bytes(checkpoint: CheckpointConfig, max_model_len: int) -> int:
    """Return the bytes of the cosines and sines of all positions, float32."""
    return 2 * max_model_len * checkpoint.head_dim * torch.float32.itemsize


def estimate_workspace(
    checkpoint: CheckpointConfig,
    shard: RankShard,
    scheduler: SchedulerConfig,
    dtype: torch.dtype,
    max_model_len: int,
) -> int:
    """Estimate the bytes that `largest_step` takes: its forward pass or its sampling, whichever is more."""
    num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    num_tokens = min(scheduler.max_num_batched_tokens, num_seqs * max_model_len)
    forward = num_tokens * _forward_width(checkpoint, shard) * dtype.itemsize
    last_hidden = num_tokens * checkpoint.hidden_size * dtype.itemsize
    sampling = num_seqs * _sampling_bytes(checkpoint, shard, dtype.itemsize)
    return num_tokens * _INPUT_BYTES + max(forward, last_hidden + sampling)


def _forward_width(checkpoint: CheckpointConfig, shard: RankShard) -> int:
    """Return the elements per token that are alive at the widest place of a layer.

    In the MLP: gate, up and their product, beside residual and the inputs of this layer, of the MLP and of the
    norm before it; the norm's two float32 copies may be wider. In attention: projected heads, normalised
    heads, and three times the heads to rotate. Everywhere the cosines and sines of the step.
    """
    hidden, size = checkpoint.hidden_size, checkpoint.head_dim
    rotated = (shard.q_heads.size + shard.kv_heads.size) * size
    attention = 3 * hidden + rotated + shard.kv_heads.size * size + 4 * rotated
    mlp = 4 * hidden + max(3 * shard.mlp_channels.size, 4 * hidden)
    return max(attention, mlp) + 2 * size


def _sampling_bytes(checkpoint: CheckpointConfig, shard: RankShard, itemsize: int) -> int:
    """Return the bytes per sequence that are alive when log-probabilities are made of whole rows of logits.

    That is on a GPU, where noise and truncation are made inside kernels. This rank's logits in the model's
    type; all tokens' in that type where ranks share them, in float32 where that is another, and their
    logarithms.
    """
    own, float32 = shard.vocab_rows.size, torch.float32.itemsize
    gathered = itemsize if own < checkpoint.vocab_size else 0
    widened = float32 if itemsize != float32 else 0
    return own * itemsize + checkpoint.vocab_size * (gathered + widened + float32)
