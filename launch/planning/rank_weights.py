"""`parallel.rank_weights: auto` becomes numbers, once, before any rank is started: all ranks split by the same.

A rank's weight is the memory of its device. What remains beside its share of the model is then in proportion
to its memory too, as is its share of the KV heads, so that no device's KV blocks run out long before another's.
All memory counts, not what is free at the moment: the split of a deployment is the same at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch.cuda_devices import CudaDevice, gpu_in_turn, look_from_outside
from tprt.config import Config
from tprt.errors import ConfigError
from tprt.log import get_logger

_LOG = get_logger(__name__)
_GIB = 2**30


def resolve_rank_weights(
    config: Config, look: Callable[[], Sequence[CudaDevice]] = look_from_outside
) -> Config:
    """Return `config` with numbers in the place of `auto`; anything else as it is.

    CPU ranks have equal memory, and so has one rank alone; no device is looked at for them.

    Raises:
        ConfigError: there are too few devices, or they cannot be looked at.
    """
    parallel = config.parallel
    if parallel.rank_weights != "auto":
        return config
    if config.runtime.device == "cpu" or parallel.tensor_parallel_size == 1:
        return _with_weights(config, None)
    devices = look()
    if not devices and config.runtime.device == "auto":
        return _with_weights(config, None)
    num_ranks = parallel.tensor_parallel_size
    if len(devices) < num_ranks and not (devices and parallel.allow_shared_gpu):
        raise ConfigError(
            f"parallel.rank_weights is auto and {len(devices)} CUDA devices are visible for"
            f" {parallel.tensor_parallel_size} ranks; give one number for each rank, lower"
            " parallel.tensor_parallel_size or set runtime.device: cpu"
        )
    places = [gpu_in_turn(rank, num_ranks, len(devices)) for rank in range(num_ranks)]
    return fit_to_memory(config, [devices[index].total // num_sharers for index, num_sharers in places])


def fit_to_memory(config: Config, memory: Sequence[int]) -> Config:
    """Return `config` with weights for ranks that have `memory` bytes each, where it says `auto`.

    Whole GiB, so that devices of one kind, which differ by a few MiB, get equal shares.
    """
    if config.parallel.rank_weights != "auto":
        return config
    weights = tuple(float(max(1, round(size / _GIB))) for size in memory)
    if len(set(weights)) == 1:
        return _with_weights(config, None)
    _LOG.info("parallel.rank_weights is auto: %s, from the memory of the devices in GiB", list(weights))
    return _with_weights(config, weights)


def _with_weights(config: Config, weights: tuple[float, ...] | None) -> Config:
    parallel = config.parallel.model_copy(update={"rank_weights": weights})
    return config.model_copy(update={"parallel": parallel})
