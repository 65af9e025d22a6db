"""Up to which size sums are done in one shot, in two, and by the group underneath: found from times, and kept.

One file for each set of devices, which are linked the same way always. Knows nothing of how times are taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class AllReduceLimits:
    """The largest sums, in bytes, that are done in one shot and in two; larger ones are the group's."""

    one_shot_bytes: int
    two_shot_bytes: int


@dataclass(frozen=True, slots=True)
class SumTimes:
    """Microseconds of a sum of `num_bytes`; `group_us` is None where the group underneath is no choice."""

    num_bytes: int
    one_shot_us: float
    two_shot_us: float
    group_us: float | None


def limits_from(times: Sequence[SumTimes]) -> AllReduceLimits:
    """Return the limits with which the sums of `times`, by rising size, take least: their product does.

    So all sizes count alike, and one that was measured badly does not decide. The group has a part in it if all
    its times are known.
    """
    num_sizes = len(times)
    has_group = all(time.group_us is not None for time in times)
    least, best = math.inf, (0, num_sizes)
    for two_end in range(num_sizes, -1 if has_group else num_sizes - 1, -1):
        for one_end in range(two_end, -1, -1):
            cost = math.fsum(math.log(us) for us in _chosen_us(times, one_end, two_end))
            if cost < least:
                least, best = cost, (one_end, two_end)
    ends = [times[end - 1].num_bytes if end else 0 for end in best]
    return AllReduceLimits(ends[0], NO_LIMIT if best[1] == num_sizes else ends[1])


def _chosen_us(times: Sequence[SumTimes], one_end: int, two_end: int) -> Iterator[float]:
    """Yield what each sum takes if those before `one_end` are done in one shot, before `two_end` in two."""
    for index, time in enumerate(times):
        if index < one_end:
            yield time.one_shot_us
        elif index < two_end:
            yield time.two_shot_us
        else:
            assert time.group_us is not None, "the group is a choice"
            yield time.group_us


class LimitsFile:
    """The limits of one topology, in a file of its own in `folder`.

    `topology` is what they hold for: whatever they depend on, as plain values.
    """

    def __init__(self, folder: Path, topology: dict[str, object]) -> None:
        digest = hashlib.sha256(json.dumps(topology, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"all-reduce-{digest}.json"
        self._topology = topology

    def read(self) -> AllReduceLimits | None:
        """Return what was kept; None where there is nothing, or nothing that can be used."""
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            limits = AllReduceLimits(**kept["limits"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sizes = (limits.one_shot_bytes, limits.two_shot_bytes)
        is_usable = kept.get("topology") == self._topology and all(isinstance(size, int) for size in sizes)
        return limits if is_usable and min(sizes) >= 0 else None

    def write(self, limits: AllReduceLimits, times: Sequence[SumTimes]) -> None:
        """Keep `limits`, with the times they come from; a reader sees all of it or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(
            {"topology": self._topology, "limits": asdict(limits), "times": [asdict(time) for time in times]},
            indent=1,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(f".{os.getpid()}")
        try:
            written.write_text(text, encoding="utf-8")
            written.replace(self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                written.unlink()
