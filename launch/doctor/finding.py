"""What a check has found: a verdict, in words, and what to do about it. Knows nothing of the checks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

NO_TIME = "no time was left for it; see --timeout-s"
_MAX_TEXT = 900
# Processes that want a CPU, for each that there is: from here on no answer may be a slow one.
_BUSY = 2


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the result.

    Attributes:
        check: what was looked at, in a word or two.
        verdict: bad: a start would fail or never end; warning: it works, and not as it should.
        found: what was found, or why it was skipped.
        fix: what to change; empty where nothing is wrong.
        details: the figures behind it, for programs.
    """

    check: str
    verdict: Verdict
    found: str
    fix: str = ""
    details: Mapping[str, object] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return it as plain values, texts shortened to one line each."""
        return asdict(self) | {"found": _shorten(self.found), "fix": _shorten(self.fix)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Finding:
        """Take what `to_fields` gave."""
        return cls(**{**fields, "verdict": Verdict(fields["verdict"])})


def ok(check: str, found: str, **details: object) -> Finding:
    """All is well."""
    return Finding(check, Verdict.OK, found, details=details)


def warning(check: str, found: str, fix: str, **details: object) -> Finding:
    """It works, and not as it should."""
    return Finding(check, Verdict.WARNING, found, fix, details)


def bad(check: str, found: str, fix: str, **details: object) -> Finding:
    """It will not work."""
    return Finding(check, Verdict.BAD, found, fix, details)


def refused(check: str, error: Exception, fix: str, **details: object) -> Finding:
    """It will not work, as an error says; what to change is what it says after its last semicolon, or `fix`."""
    found, _, advice = str(error).rpartition("; ")
    return bad(check, found or advice, advice if found else fix, **details)


def silent(check: str, found: str, fix: str) -> Finding:
    """It gave no answer in its time: bad, or on a busy machine a warning, since it may only be slow."""
    load, num_cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= _BUSY * num_cpus:
        return bad(check, found, fix)
    busy = f"{found}, on a busy machine (load {load:.1f} on {num_cpus} CPUs)"
    return warning(check, busy, f"try again when it is idle, or with --timeout-s 60; if it stays so: {fix}")


def skipped(check: str, why: str) -> Finding:
    """It could not be looked at, or need not be."""
    return Finding(check, Verdict.SKIPPED, why)


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict: bad, warning or ok."""
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.BAD, Verdict.WARNING) if verdict in found), Verdict.OK)


def _shorten(text: str) -> str:
    """Return `text` on one line, its middle left out where it is very long."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT // 2]} ... {line[-_MAX_TEXT // 2 :]}"
