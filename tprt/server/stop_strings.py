"""Finds the first stop string in a text that comes in pieces, and holds back what may be the beginning of one.

Where the pieces are cut changes nothing: the text ends before the stop string that is complete first, and of
those complete at the same character before the longest. Costs a constant time per character and stop string,
however long the text (Knuth, Morris and Pratt 1977). Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The search in one text.

    Attributes:
        found: the stop string that has come; None while none has.
        held: the end of the text so far that may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Search for any of `stops`, none of which is empty."""
        self.found: str | None = None
        self.held = ""
        self._searches = [_Search(stop) for stop in stops]
        self._first_characters = {stop[0] for stop in stops}

    def feed(self, piece: str, may_end: bool = True) -> str:
        """Take the next piece of the text; return what is certainly before any stop string.

        After a stop string was found there is no more of it. One that is complete in a piece which may not
        end the text does not count.
        """
        if self.found is not None:
            return ""
        if not self.held and self._first_characters.isdisjoint(piece):
            return piece
        text = self.held + piece
        for at, character in enumerate(piece, len(self.held) + 1):
            ended = [search.stop for search in self._searches if search.step(character)]
            if ended and may_end:
                self.found = max(ended, key=len)
                self.held = ""
                return text[: at - len(self.found)]
        num_held = max(search.matched for search in self._searches)
        self.held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def release(self) -> str:
        """Return what was held back, since no more text comes."""
        held, self.held = self.held, ""
        return held


class _Search:
    """How much of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = _shorter_matches(stop)

    def step(self, character: str) -> bool:
        """Take the next character; tell whether the stop string ends with it."""
        matched = self.matched
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched]
        if self.stop[matched] == character:
            matched += 1
        is_whole = matched == len(self.stop)
        self.matched = self._shorter[matched] if is_whole else matched
        return is_whole


def _shorter_matches(stop: str) -> list[int]:
    """Return, for each number of matched characters, the next smaller one that they end with as well."""
    shorter = [0] * (len(stop) + 1)
    matched = 0
    for length in range(2, len(stop) + 1):
        character = stop[length - 1]
        while matched and stop[matched] != character:
            matched = shorter[matched]
        if stop[matched] == character:
            matched += 1
        shorter[length] = matched
    return shorter
