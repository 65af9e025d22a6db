"""A rank of a model whose weights are random, alone in its group, on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from tprt.distributed import TPGroup
from tprt.worker.model_runner import ModelRunner


def make_runner(
    folder: Path, dtype: str, scheduler: SchedulerConfig, cache: CacheConfig | None = None
) -> ModelRunner:
    """Return the only rank; `folder` has a config.json and needs nothing else."""
    config = Config(
        model=ModelConfig.model_validate({"path": str(folder), "dtype": dtype, "load_format": "dummy"}),
        cache=cache or CacheConfig(block_size=4),
        scheduler=scheduler,
        runtime=RuntimeConfig(device="cpu", num_threads=1),
    )
    return ModelRunner(config, read_checkpoint_config(str(folder)), TPGroup(0, 1), torch.device("cpu"))
