"""What is said of checks that have not answered when the time is over, or when torch has crashed."""

from __future__ import annotations

import json

import pytest

from launch.doctor.checks import CHECKS
from launch.doctor.examine import Results
from launch.doctor.finding import Finding, Verdict, ok, worst

NUMBERS = {check.name: number for number, check in enumerate(CHECKS)}


def results_of(**heard: list[str | Finding]) -> Results:
    """Return results after these messages of checks, whose names have _ for a space."""
    results = Results()
    for name, messages in heard.items():
        for what in messages:
            said = what if isinstance(what, str) else what.to_fields()
            results.hear(json.dumps([NUMBERS[name.replace("_", " ")], said]).encode())
    return results


def by_name(findings: list[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.check, []).append(finding)
    return found


def test_each_check_without_an_answer_is_told_by_how_far_it_had_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    results = results_of(
        versions=["began", ok("versions", "all"), "ended"],
        torch=["began", ok("torch", "2.13"), "ended"],
        disk=["began"],
        GPUs=["began", ok("devices", "eight")],
    )
    found = by_name(results.findings("9.0 s were over", has_crashed=False))
    assert [finding.found for finding in found["versions"]] == ["all"]
    assert (found["disk"][0].verdict, found["disk"][0].found) == (
        Verdict.BAD,
        "gave no answer: 9.0 s were over",
    )
    assert "model.path" in found["disk"][0].fix
    assert found["all-reduce"][0].found == "waited for the check of GPUs: 9.0 s were over"
    assert found["GPUs"][0].found == "gave no answer: 9.0 s were over"
    assert found["server"][0].found == "was not begun yet: 9.0 s were over"
    assert set(found) == {"devices", *(check.name for check in CHECKS)}
    assert worst(results.findings("", has_crashed=False)) is Verdict.BAD


def test_a_torch_that_takes_too_long_is_a_warning_and_what_needs_it_is_skipped() -> None:
    found = by_name(results_of(versions=["began", "ended"]).findings("9.0 s were over", has_crashed=False))
    assert (found["torch"][0].verdict, found["all-reduce"][0].verdict) == (Verdict.WARNING, Verdict.SKIPPED)
    assert found["all-reduce"][0].found == "waited for the import of torch: 9.0 s were over"
    assert "versions" not in found


def test_what_devices_leave_no_time_for_is_a_warning() -> None:
    results = Results(is_on_gpus=True)
    for name in ("torch", "attention"):
        results.hear(json.dumps([NUMBERS[name], "began"]).encode())
    row = by_name(results.findings("9.0 s were over", has_crashed=False))["attention"][0]
    assert (row.verdict, row.found) == (Verdict.WARNING, "was not done yet: 9.0 s were over")
    assert row.fix.startswith("try again with --timeout-s 60")


def test_what_a_crash_of_torch_cuts_short_is_not_to_blame() -> None:
    results = results_of(host=["began", ok("run directory", "fine")], disk=["began"])
    found = by_name(results.findings("the process died", has_crashed=True))
    assert found["torch"][0].verdict is Verdict.BAD
    assert found["disk"][0].verdict is Verdict.SKIPPED
    assert "host" not in found
    assert found["run directory"][0].verdict is Verdict.OK
