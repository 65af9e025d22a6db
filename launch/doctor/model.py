"""Whether the model can be split over the ranks, and its text be read and written. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.checkpoint_tokenizer import open_tokenizer
from launch.doctor.finding import Finding, bad, ok, refused, warning
from launch.doctor.request import DoctorRequest
from tprt.checkpoint_config import CheckpointConfig, read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.errors import CheckpointError, ConfigError, ShardPlanError, UnsupportedModelError
from tprt.sharding import legal_world_sizes, make_shard_plan, shape_of

_FOLDER = "set model.path to a folder with config.json, *.safetensors and tokenizer.json, or fetch them again"


def check_model(request: DoctorRequest) -> Iterator[Finding]:
    """Look at config.json and the split that follows, and at the tokenizer."""
    config = request.config
    try:
        checkpoint = read_checkpoint_config(config.model.path)
    except (CheckpointError, UnsupportedModelError) as error:
        yield refused("model", error, _FOLDER)
        return
    yield _split(config, checkpoint)
    yield _tokenizer(config)


def _split(config: Config, checkpoint: CheckpointConfig) -> Finding:
    shape, num_ranks = shape_of(checkpoint), config.parallel.tensor_parallel_size
    legal = legal_world_sizes(shape)
    weights = None if config.parallel.rank_weights == "auto" else config.parallel.rank_weights
    try:
        plan = make_shard_plan(shape, num_ranks, weights)
    except ShardPlanError as error:
        fix = f"set parallel.tensor_parallel_size to {legal[0]} to {legal[-1]}, or change rank_weights"
        return bad("model", str(error), fix)
    try:
        max_model_len = resolve_max_model_len(checkpoint, config.model.max_model_len)
    except ConfigError as error:
        return bad("model", str(error), "lower model.max_model_len, or leave it out")
    heads = _sum([shard.q_heads.size for shard in plan.shards])
    kv_heads = _sum([shard.kv_heads.size for shard in plan.shards])
    return ok(
        "model",
        f"{checkpoint.architecture} on {num_ranks} ranks: query heads {heads}, KV heads {kv_heads}; sequences"
        f" of up to {max_model_len:,} tokens; {legal[0]} to {legal[-1]} ranks are possible",
        legal_world_sizes=[legal[0], legal[-1]],
    )


def _sum(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))


def _tokenizer(config: Config) -> Finding:
    try:
        tokenizer = open_tokenizer(config.model.path)
    except CheckpointError as error:
        return refused("tokenizer", error, _FOLDER)
    if tokenizer is None:
        text = f"{config.model.path} has no tokenizer.json: only token ids can be prompts"
        return warning("tokenizer", text, "add tokenizer.json and tokenizer_config.json of the model")
    return ok("tokenizer", "tokenizer.json and its settings can be read")
