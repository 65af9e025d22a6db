"""What the processes of a server hold over time: memory and descriptors, and whether that grows.

Knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MIB = 1024 * 1024
_LOOK_S = 0.5
_FEWEST_SAMPLES = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a process."""

    at_s: float
    pid: int
    resident_mib: float
    num_descriptors: int


def look_at(pid: int) -> Sample | None:
    """Return what a process holds; None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        num_descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
    return Sample(time.monotonic(), pid, pages * os.sysconf("SC_PAGE_SIZE") / _MIB, num_descriptors)


class Watch:
    """Looks at processes until it is cancelled.

    Attributes:
        samples: of each process by name, in the order of time.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids
        self.samples: defaultdict[str, list[Sample]] = defaultdict(list)

    async def run(self) -> None:
        """Look, again and again."""
        while True:
            for name, pid in self._pids().items():
                if (sample := look_at(pid)) is not None:
                    self.samples[name].append(sample)
            await asyncio.sleep(_LOOK_S)


@dataclass(frozen=True, slots=True)
class Trend:
    """The memory of one process over the second half of the time, the first being warm-up.

    Attributes:
        first_mib, last_mib: at its beginning and its end, off the straight line through all samples.
        num_samples: samples of the process that was there last.
    """

    first_mib: float
    last_mib: float
    num_samples: int

    @property
    def growth_mib(self) -> float:
        """How much more it has at the end."""
        return self.last_mib - self.first_mib


def second_half(samples: Sequence[Sample]) -> Trend | None:
    """Return the trend of the process that was there last; None where it has been seen too few times."""
    last = [sample for sample in samples if sample.pid == samples[-1].pid]
    if len(last) < _FEWEST_SAMPLES:
        return None
    middle_s = (last[0].at_s + last[-1].at_s) / 2
    half = [sample for sample in last if sample.at_s >= middle_s]
    times_s = np.array([sample.at_s for sample in half]) - half[0].at_s
    slope, start = np.polyfit(times_s, [sample.resident_mib for sample in half], 1)
    return Trend(float(start), float(start + slope * times_s[-1]), len(last))
