"""How long an all-reduce takes, by backend, number of ranks and size: tables of measurements, to plan with.

Between two measured sizes time is interpolated, beyond the last one it grows with the size. Knows nothing of
models. The sources: NCCL on 8 x H100, Triton-distributed issue 57 and vLLM pull request 42324; one-shot
symmetric memory on 8 H100, SGLang pull request 2904; 2 to 4 H200, and shm and gloo on two CPU cores,
`tprt bench allreduce`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[int, float]]
"""Bytes and microseconds, in ascending order."""

_KIB, _MIB = 2**10, 2**20
_CURVES: Mapping[str, Mapping[int, Curve]] = {
    "nccl": {
        2: (
            *((_KIB, 11.8), (4 * _KIB, 12.1), (16 * _KIB, 12.8), (64 * _KIB, 12.9), (256 * _KIB, 14.1)),
            *((_MIB, 19.3), (4 * _MIB, 36.9), (16 * _MIB, 80.7)),
        ),
        4: (
            *((_KIB, 13.8), (4 * _KIB, 14.1), (16 * _KIB, 15.1), (64 * _KIB, 15.5), (256 * _KIB, 16.0)),
            *((_MIB, 22.1), (4 * _MIB, 43.9), (16 * _MIB, 96.7)),
        ),
        8: (
            *((128, 19.2), (16 * _KIB, 20.7), (64 * _KIB, 23.1), (128 * _KIB, 23.7), (256 * _KIB, 24.8)),
            *((_MIB, 32.4), (2 * _MIB, 37.0), (4 * _MIB, 50.0)),
        ),
    },
    "symm_mem": {
        2: (
            *((_KIB, 2.5), (4 * _KIB, 2.8), (16 * _KIB, 2.9), (64 * _KIB, 3.2), (256 * _KIB, 8.3)),
            *((_MIB, 11.2), (4 * _MIB, 22.6), (16 * _MIB, 68.7)),
        ),
        3: (
            *((_KIB, 2.9), (4 * _KIB, 3.2), (16 * _KIB, 3.4), (64 * _KIB, 3.9), (256 * _KIB, 10.3)),
            *((_MIB, 15.9), (4 * _MIB, 34.6), (16 * _MIB, 101.5)),
        ),
        4: (
            *((_KIB, 3.1), (4 * _KIB, 3.5), (16 * _KIB, 3.7), (64 * _KIB, 4.4), (256 * _KIB, 10.2)),
            *((_MIB, 19.7), (4 * _MIB, 38.1), (16 * _MIB, 102.8)),
        ),
        8: ((4 * _KIB, 5.9), (32 * _KIB, 7.8), (256 * _KIB, 16.7), (512 * _KIB, 22.1), (_MIB, 33.8)),
    },
    "shm": {
        2: ((2 * _KIB, 4.0), (18 * _KIB, 6.5), (64 * _KIB, 13.0), (_MIB, 130.0)),
        3: ((2 * _KIB, 17.0), (18 * _KIB, 36.0), (64 * _KIB, 57.0), (_MIB, 360.0)),
        4: ((2 * _KIB, 29.0), (18 * _KIB, 68.0), (64 * _KIB, 140.0), (_MIB, 970.0)),
    },
    "gloo": {
        2: ((18 * _KIB, 390.0), (64 * _KIB, 390.0), (_MIB, 670.0)),
        3: ((2 * _KIB, 1300.0), (64 * _KIB, 2000.0), (_MIB, 2700.0)),
        4: ((2 * _KIB, 4600.0), (64 * _KIB, 7400.0), (_MIB, 8300.0)),
    },
}
SOURCES: Mapping[str, str] = {
    "nccl": "NCCL as seen with NVLink, on 2 and 4 H200 and on 8 H100",
    "symm_mem": "symmetric memory as seen with NVLink: ours on 2 to 4 H200, others' in one shot on 8 H100",
    "shm": "shared memory as seen on two CPU cores",
    "gloo": "gloo as seen on two CPU cores",
}
"""Where the figures of each backend come from."""


def all_reduce_us(backend: str, num_ranks: int, num_bytes: int) -> float:
    """Return the microseconds of one all-reduce of `num_bytes` between `num_ranks` (0.0 for one rank).

    A number of ranks that was not measured gets the next larger measured one, or the largest.
    """
    if num_ranks == 1:
        return 0.0
    curves = _CURVES[backend]
    measured = min((ranks for ranks in curves if ranks >= num_ranks), default=max(curves))
    return _at(curves[measured], num_bytes)


def _at(curve: Curve, num_bytes: int) -> float:
    if num_bytes <= curve[0][0]:
        return curve[0][1]
    index = min(bisect_left(curve, num_bytes, key=lambda point: point[0]), len(curve) - 1)
    (low, low_us), (high, high_us) = curve[index - 1], curve[index]
    return low_us + (high_us - low_us) * (num_bytes - low) / (high - low)
