"""How many CUDA devices a process started from this one sees, asked of the driver alone.

This module runs as that process too: it imports no torch and opens no device, so that it takes some tens of
milliseconds. Knows nothing of what the devices are.
"""

from __future__ import annotations

import subprocess
import sys

from launch.cuda_driver import CudaDriver, CudaError
from tprt.errors import ConfigError

# A driver that hangs must not hang the start.
_DEADLINE_S = 60.0


def count_cuda_devices() -> int:
    """Return the number of devices; 0 where there is no driver, or one without devices.

    Raises:
        ConfigError: the driver gave no answer.
    """
    command = [sys.executable, "-m", "launch.cuda_count"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE_S, check=True, stdin=subprocess.DEVNULL
        )
        return int(found.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"the CUDA driver of this host does not say what devices there are ({error}); see whether"
            " nvidia-smi does, or set runtime.device: cpu"
        ) from error


def _ask_driver() -> int:
    try:
        return CudaDriver().num_devices
    except CudaError:
        return 0


if __name__ == "__main__":
    print(_ask_driver())
