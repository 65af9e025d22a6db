"""Answers and events come out whole, whatever pieces the network makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.serve_parser import BadResponseError, EventParser, ResponseParser

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;name=value\r\n world\r\n0\r\nTrailer: x\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.lists(st.integers(0, 200)), st.sampled_from([CHUNKED, SIZED, INTERIM + CHUNKED]))
def test_any_pieces_make_the_same_answer(cuts: list[int], answer: bytes) -> None:
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in in_pieces(answer, cuts))
    assert (parser.status, body) == ((404, b"no!") if answer == SIZED else (200, b"hello world"))
    assert parser.is_done
    assert parser.keeps_alive


def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    parser = ResponseParser()
    assert not parser.ends_with_connection
    assert parser.feed(b"HTTP/1.1 200 OK\r\n\r\nsome") + parser.feed(b" more") == b"some more"
    assert not parser.is_done
    assert parser.ends_with_connection
    assert not parser.keeps_alive


@pytest.mark.parametrize("part", [b"HTTP/1.1 200 OK\r\nTransfer-Enco", CHUNKED[:-2], SIZED[:-1]])
def test_an_answer_that_is_cut_short_is_not_whole(part: bytes) -> None:
    parser = ResponseParser()
    parser.feed(part)
    assert not parser.is_done
    assert not parser.ends_with_connection


def test_an_answer_without_a_body_is_whole_with_its_head() -> None:
    for head in (b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
        parser = ResponseParser()
        assert parser.feed(head) == b""
        assert parser.is_done


def test_a_connection_that_is_to_close_is_not_used_again() -> None:
    parser = ResponseParser()
    parser.feed(SIZED.replace(b"Content", b"Connection: close\r\nContent"))
    assert parser.is_done
    assert not parser.keeps_alive


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 what\r\n\r\n", CHUNKED.replace(b"5\r\n", b"x\r\n"), b"x" * 70_000]
)
def test_what_is_not_http_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(BadResponseError):
        ResponseParser().feed(data)


@given(st.lists(st.integers(0, 200)), st.sampled_from([b"\n", b"\r\n"]))
def test_any_pieces_make_the_same_events(cuts: list[int], end: bytes) -> None:
    lines = [
        b": comment",
        b"",
        b"data: one",
        b"",
        b"event: x",
        b"data:two",
        b"data: and more",
        b"",
        b"id: 7",
        b"",
        b"",
    ]
    stream = end.join(lines)
    parser = EventParser()
    events = [event for piece in in_pieces(stream, cuts) for event in parser.feed(piece)]
    assert events == [b"one", b"two\nand more"]
