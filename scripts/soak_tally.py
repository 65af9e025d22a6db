"""What came of a soak's requests: counts, and what must not be. Knows nothing of how they were made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_MAX_SHOWN = 20
_SHOWN_CHARS = 400


@dataclass(slots=True)
class Tally:
    """Counts by kind.

    Attributes:
        counts: what went as it should.
        violations: what did not; their number by kind, and the words of the first ones.
    """

    counts: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)

    def count(self, kind: str, number: int = 1) -> None:
        """Note that something went as it should."""
        self.counts[kind] += number

    def violate(self, kind: str, words: str) -> None:
        """Note what must not be."""
        self.violations[kind] += 1
        if len(self.words) < _MAX_SHOWN:
            self.words.append(f"{kind}: {words[:_SHOWN_CHARS]}")

    def check(self, kind: str, is_so: bool, words: str) -> None:
        """Note `kind` as a violation unless it `is_so`."""
        if is_so:
            self.count(f"checked: {kind}")
        else:
            self.violate(kind, words)

    def table(self) -> str:
        """Return all counts, for people."""
        rows = [(kind, number, "") for kind, number in sorted(self.counts.items())]
        rows += [(kind, number, "VIOLATION") for kind, number in sorted(self.violations.items())]
        lines = [f"{kind:<48} {number:>8} {mark}".rstrip() for kind, number, mark in rows]
        return "\n".join([*lines, *self.words])
