"""The chaos matrix as tables for people: one for each victim, a line for each phase, a column for each fault.

Knows nothing of how the rows came about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.chaos_matrix import PHASES, Fault, Outcome, Victim

Row = Mapping[str, Any]
_NO = "n/a"


def markdown(rows: Sequence[Row]) -> str:
    """Return the tables, the reasons for cells that make no sense, and what is not as it must be."""
    parts = [_summary(rows)]
    for victim in Victim:
        parts.append(
            f"### {victim[0].upper()}{victim[1:]}\n\n{_table([r for r in rows if r['victim'] == victim])}"
        )
    parts += [_reasons(rows), _problems(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    ran = [row for row in rows if row["verdict"] != _NO]
    good = sum(row["verdict"] == "good" for row in ran)
    return f"{len(rows)} cells: {len(rows) - len(ran)} make no sense, {len(ran)} ran, {good} of them are good."


def _table(rows: Sequence[Row]) -> str:
    by_place = {(row["phase"], row["fault"]): row for row in rows}
    lines = [f"| phase | {' | '.join(Fault)} |", f"|---|{'---|' * len(Fault)}"]
    for phase in PHASES:
        cells = [_cell(by_place.get((phase.words, fault))) for fault in Fault]
        lines.append(f"| {phase.words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    """Return outcome, seconds to detection and exit code; `!` where something is not as it must be."""
    if row is None:
        return ""
    if row["verdict"] == _NO:
        return _NO
    words = [_MARKS[row["outcome"]] if row["names_cause"] is not False else "not named"]
    if row["detection_s"] is not None:
        words.append(f"{row['detection_s']:.2f} s")
    words.append(f"exit {row['exit_code']}" if row["exit_code"] is not None else "hangs")
    wrong = {
        "leftovers": row["leftovers"],
        "survivors": row["survivors"],
        "tokens": row["tokens_equal"] is False,
    }
    words += [name for name, is_wrong in wrong.items() if is_wrong]
    return f"{'**!** ' if row['problems'] else ''}{', '.join(words)}"


_MARKS: dict[str, str] = {
    Outcome.FATAL: "named",
    Outcome.REPLACED: "replaced",
    Outcome.HARMLESS: "ends",
    Outcome.WAITS: "waits",
    Outcome.GOES_DOWN: "all gone",
}


def _reasons(rows: Sequence[Row]) -> str:
    reasons: dict[str, int] = {}
    for row in rows:
        if row["verdict"] == _NO:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    lines = [f"* {reason} ({count} cells)" for reason, count in reasons.items()]
    return "\n".join(["Cells that make no sense (n/a):\n", *lines]) if lines else ""


def _problems(rows: Sequence[Row]) -> str:
    """Return what is wrong, each kind once, with the cells where it is."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        for problem in row.get("problems", ()):
            kind = re.sub(r"^noticed after [\d.]+ s", "noticed too late", problem)
            kinds.setdefault(kind, []).append(f"`{row['cell']}`")
    lines = [f"* {kind}: {', '.join(cells)}" for kind, cells in kinds.items()]
    return "\n".join(["Not as it must be (`!`):\n", *lines]) if lines else "No cell is other than it must be."
