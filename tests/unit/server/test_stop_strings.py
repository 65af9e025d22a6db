"""The text ends before the stop string that is complete first, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.server.stop_strings import StopStrings

WORDS = st.text("ab", min_size=1, max_size=5)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the first stop string to end, of several the longest; and that string."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.text("ab", max_size=6), max_size=8), st.lists(WORDS, min_size=1, max_size=3))
def test_the_search_finds_what_a_look_at_the_whole_finds(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    before, found = expected(text, stops)
    search = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += search.feed(piece)
        assert before.startswith(shown), "what was shown is past the stop string"
    assert search.found == found
    assert shown + search.release() == before


@settings(max_examples=300, deadline=None, database=None)
@given(st.text("ab", max_size=12), st.integers(0, 12), st.lists(WORDS, min_size=1, max_size=3))
def test_what_is_complete_before_the_text_may_end_is_passed_over(text: str, at: int, stops: list[str]) -> None:
    ends = [end for end in range(at + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    search = StopStrings(stops)
    shown = "".join(search.feed(letter, place >= at) for place, letter in enumerate(text)) + search.release()
    if ends:
        found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (shown, search.found) == (text[: ends[0] - len(found)], found)
    else:
        assert (shown, search.found) == (text, None)


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(WORDS, max_size=8), st.lists(WORDS, min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    search = StopStrings(stops)
    for piece in pieces:
        search.feed(piece)
        assert search.held == "" or any(stop.startswith(search.held) for stop in stops)


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [("xabcd", ["abcd", "bc"], "xa"), ("aab", ["ab", "aab"], ""), ("aaab", ["aab"], "a"), ("x", ["xy"], "x")],
)
def test_cutting_a_text_elsewhere_changes_nothing(text: str, stops: list[str], before: str) -> None:
    for size in range(1, len(text) + 1):
        search = StopStrings(stops)
        parts = [search.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(parts) + search.release() == before
