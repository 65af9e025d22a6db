"""What tests of single checks of `tprt doctor` share: they run in the process of the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from launch.doctor.finding import Finding
from launch.doctor.request import DoctorRequest
from tprt.config import Config

Rows = dict[str, Finding]


def request_for(path: object = "nowhere", **sections: dict[str, Any]) -> DoctorRequest:
    """Return a request about a checkpoint in `path`, with other settings by section."""
    config = Config.model_validate({"model": {"path": str(path)} | sections.pop("model", {}), **sections})
    return DoctorRequest(config, (), time.monotonic() + 30.0)


def run_check(check: Callable[[DoctorRequest], Iterator[Finding]], request: DoctorRequest) -> Rows:
    """Return what a check finds, by name."""
    findings = list(check(request))
    rows = {finding.check: finding for finding in findings}
    assert len(rows) == len(findings)
    return rows
