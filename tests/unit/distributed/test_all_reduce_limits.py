"""Each size is summed the way that was fastest, and what was found is kept for the same devices only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tprt.distributed.all_reduce_limits import NO_LIMIT, AllReduceLimits, LimitsFile, SumTimes, limits_from

Row = tuple[float, float, float | None]
TOPOLOGY: dict[str, object] = {"devices": ["GPU-a", "GPU-b"], "torch": "2.11"}


@pytest.mark.parametrize(
    ("rows", "limits"),
    [
        # one shot, two shots, group
        ([(5, 8, None), (6, 8, None), (9, 8, None)], AllReduceLimits(2, NO_LIMIT)),
        ([(5, 8, 20), (9, 8, 20), (90, 40, 30)], AllReduceLimits(1, 2)),
        # the group is fast once and then not
        ([(5, 8, 4), (9, 8, 20), (90, 40, 41)], AllReduceLimits(1, NO_LIMIT)),
        # as measured once on two GPUs that had been idle: the first size took too long
        ([(12.1, 10.4, 19), (8.7, 11.1, 9.3), (8.8, 14, 18), (90, 72, 80)], AllReduceLimits(3, NO_LIMIT)),
        # without a group there is nothing beyond two shots
        ([(9, 8, None), (9, 8, None), (9, 8, 1)], AllReduceLimits(0, NO_LIMIT)),
        ([(9, 8, 7), (9, 8, 7), (9, 8, 7)], AllReduceLimits(0, 0)),
        ([(8, 9, 7), (8, 9, 7), (8, 9, 7)], AllReduceLimits(0, 0)),
        ([(8, 8, 8), (8, 8, 8)], AllReduceLimits(2, NO_LIMIT)),
    ],
)
def test_the_limits_are_those_with_which_all_sizes_take_least(rows: list[Row], limits: AllReduceLimits) -> None:
    times = [SumTimes(size + 1, *row) for size, row in enumerate(rows)]
    assert limits_from(times) == limits


def test_what_is_kept_is_read_for_the_same_topology_alone(tmp_path: Path) -> None:
    folder, limits = tmp_path / "not" / "there", AllReduceLimits(10, NO_LIMIT)
    file = LimitsFile(folder, TOPOLOGY)
    assert file.read() is None
    file.write(limits, [SumTimes(10, 1.0, 2.0, None)])
    assert LimitsFile(folder, dict(reversed(TOPOLOGY.items()))).read() == limits
    assert LimitsFile(folder, {**TOPOLOGY, "torch": "2.12"}).read() is None
    assert list(folder.iterdir()) == [file.path]
    assert json.loads(file.path.read_text())["topology"] == TOPOLOGY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"limits": {"one_shot_bytes": 1}}',
        json.dumps({"limits": {"one_shot_bytes": 1, "two_shot_bytes": 2}}),
        json.dumps({"topology": TOPOLOGY, "limits": {"one_shot_bytes": "1", "two_shot_bytes": 2}}),
        json.dumps({"topology": TOPOLOGY, "limits": {"one_shot_bytes": -1, "two_shot_bytes": 2}}),
    ],
)
def test_a_file_that_cannot_be_used_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    file = LimitsFile(tmp_path, TOPOLOGY)
    file.path.write_text(text)
    assert file.read() is None
