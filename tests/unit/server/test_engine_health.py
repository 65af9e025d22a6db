"""Health is progress against what waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tprt.server.engine_health import EngineSigns, judge

WELL = EngineSigns(
    now_s=1000.0,
    is_dead=False,
    is_ready=True,
    is_replacing=False,
    waiting_since_s=900.0,
    progress_s=999.0,
    beat_s=0.0,
)


@pytest.mark.parametrize(
    ("changed", "healthy", "reason"),
    [
        ({}, True, "steps are finished"),
        ({"progress_s": 960.0}, False, "no progress for 40 s; expected some every 30 s"),
        ({"progress_s": 960.0, "waiting_since_s": None}, True, "nothing to do"),
        ({"progress_s": 0.0, "waiting_since_s": 990.0}, True, "steps are finished"),
        ({"progress_s": 960.0, "beat_s": 995.0}, True, "steps are finished"),
        ({"is_replacing": True}, True, "being replaced"),
        ({"is_replacing": True, "progress_s": 960.0}, False, "no progress"),
        ({"is_ready": False, "progress_s": 0.0}, True, "not ready yet"),
        ({"is_dead": True, "is_ready": False}, False, "the engine has ended"),
    ],
)
def test_work_must_have_come_further_within_the_time(
    changed: dict[str, object], healthy: bool, reason: str
) -> None:
    found, why = judge(replace(WELL, **changed), 30.0)  # type: ignore[arg-type]
    assert found is healthy
    assert reason in why
