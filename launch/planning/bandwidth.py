"""How fast a device goes through a decode step: GPUs by name and by what was measured, CPUs by trying."""

from __future__ import annotations

import time

import torch

# GB/s at peak, by a part of the name that torch gives; the first that is found counts.
_PEAK_GBS = (
    *(("B200", 8000.0), ("GH200", 4000.0), ("H200", 4800.0), ("H100 NVL", 3938.0), ("H100 PCIe", 2039.0)),
    *(("H100", 3350.0), ("H20", 4000.0), ("A100 80GB PCIe", 1935.0), ("A100-SXM4-80GB", 2039.0)),
    *(("A100", 1555.0), ("L40S", 864.0), ("L40", 864.0), ("L4", 300.0), ("A10G", 600.0), ("A10", 600.0)),
    *(("A40", 696.0), ("T4", 320.0), ("V100", 900.0), ("RTX 6000 Ada", 960.0), ("RTX A6000", 768.0)),
    *(("RTX 5090", 1792.0), ("RTX 4090", 1008.0), ("RTX 3090", 936.0)),
)
# Fitted to captured decode steps of 0.6B and 8B on an H100 and an H200 (docs/benchmarks.md): the share of the
# peak at which memory is read, and the microseconds that kernels of a layer take besides, with one row and with
# more.
SHARE_OF_PEAK = 0.82
_ONE_ROW_LAYER_US, _LAYER_US = 16.0, 25.0
_COPY_BYTES, _COPIES = 2**27, 5


def peak_gbs(name: str) -> float | None:
    """Return the peak of the GPU called `name` in GB/s; None when it is not known."""
    return next((peak for part, peak in _PEAK_GBS if part in name), None)


def gpu_layer_us(batch_size: int) -> float:
    """Return the microseconds that the kernels of a layer take besides reading, in a captured step."""
    return _ONE_ROW_LAYER_US if batch_size == 1 else _LAYER_US


def measure_cpu_gbs() -> float:
    """Return what the cores of this process read and write together when they copy memory, in GB/s."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(_COPIES):
        start_s = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * _COPY_BYTES / best_s / 1e9
