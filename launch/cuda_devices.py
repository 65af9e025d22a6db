"""Which CUDA devices the ranks of this host will see, and what memory each has.

`look_from_outside` asks a process of its own, as which this module runs too: the one that asks takes no memory
on any device, and devices are numbered as the ranks will number them (CUDA puts the fastest first unless
CUDA_DEVICE_ORDER says otherwise, and nvidia-smi does not). Knows nothing of models.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from launch.cuda_driver import CudaDriver, CudaError
from tprt.errors import ConfigError

# Every device is opened; a driver that hangs must not hang the start.
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A device: its name, its memory, and how much of that is free, in bytes."""

    name: str
    total: int
    free: int


def gpu_in_turn(rank: int, num_ranks: int, num_gpus: int) -> tuple[int, int]:
    """Return which GPU a rank of this host has, and how many ranks have that one."""
    index = rank % num_gpus
    return index, len(range(index, num_ranks, num_gpus))


def any_shares_gpu(num_ranks: int, num_gpus: int, allow_shared_gpu: bool) -> bool:
    """Tell whether ranks of this host have a GPU in common.

    Raises:
        ConfigError: there is none for each, and they may not share.
    """
    any_shared = num_ranks > num_gpus
    if num_gpus == 0 or (any_shared and not allow_shared_gpu):
        shared = " set parallel.allow_shared_gpu: true (for tests)," if num_gpus else ""
        raise ConfigError(
            f"{num_ranks} ranks of this host need a CUDA device each, but {num_gpus} are visible; lower"
            f" parallel.tensor_parallel_size,{shared} or set runtime.device: cpu"
        )
    return any_shared


def look_at_device(driver: CudaDriver, index: int) -> CudaDevice:
    """Return a device whose context this thread has entered, as it must to ask what is free."""
    free, total = driver.memory()
    return CudaDevice(driver.name(index), total, free)


def look_at_devices() -> list[CudaDevice]:
    """Return the devices that this process sees; none where CUDA does not work.

    Raises:
        CudaError: one of them cannot be opened.
    """
    try:
        driver = CudaDriver()
    except CudaError:
        return []

    def look(index: int) -> CudaDevice:
        driver.open(index)
        return look_at_device(driver, index)

    # In threads of their own, so that this one stays in the context that it is in.
    with ThreadPoolExecutor(max(1, driver.num_devices)) as threads:
        return list(threads.map(look, range(driver.num_devices)))


def look_from_outside(deadline_s: float = _DEADLINE_S) -> list[CudaDevice]:
    """Return the devices that a process started from this one sees.

    Raises:
        ConfigError: it failed, or gave no answer in `deadline_s`.
    """
    command = [sys.executable, "-m", "launch.cuda_devices"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=deadline_s, check=True, stdin=subprocess.DEVNULL
        )
        return [CudaDevice(**device) for device in json.loads(found.stdout)]
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"the CUDA devices of this host did not answer in {deadline_s:g} s; see whether nvidia-smi does, or"
            " give parallel.rank_weights as numbers"
        ) from None
    except (subprocess.CalledProcessError, ValueError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ConfigError(
            f"the CUDA devices of this host cannot be looked at: {said.strip().splitlines()[-1]}; give"
            " parallel.rank_weights as numbers"
        ) from error


if __name__ == "__main__":
    print(json.dumps([asdict(device) for device in look_at_devices()]))
