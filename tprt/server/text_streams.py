"""The text of a sequence of tokens, token by token: what has been given out is final.

One class for each way in which tokens make text. Knows nothing of files, and of which tokenizer needs which.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"
# So many tokens of context make the text of the next one independent of what was before.
_CONTEXT_TOKENS = 8
# A window that still ends in U+FFFD after so many tokens is no character that waits for its rest.
_WINDOW_TOKENS = 16

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TextStream(Protocol):
    """The text of one sequence of tokens."""

    def step(self, token_id: int) -> str:
        """Take the next token; return the text that is complete with it, often one word, sometimes none."""
        ...

    def finish(self) -> str:
        """Return the rest, since no more tokens come; bytes that are no character become U+FFFD."""
        ...


class ByteStream:
    """Text of tokens that are bytes of UTF-8; bytes that cannot be become U+FFFD as soon as that is certain."""

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        """Take the bytes of each token, of which there are none where it has no text."""
        self._bytes_of = bytes_of
        self._decode = _Utf8Decoder("replace").decode

    def step(self, token_id: int) -> str:
        """See `TextStream`."""
        return self._decode(self._bytes_of[token_id])

    def finish(self) -> str:
        """See `TextStream`."""
        return self._decode(b"", True)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to the text.

    Attributes:
        first: its text where the sequence begins.
        later: its text anywhere else.
        byte: its value where it stands for a byte, and then it has no text of its own.
    """

    first: str
    later: str
    byte: int | None = None


class PieceStream:
    """Text of tokens that are text, with byte tokens among them.

    Byte tokens in a row are one: characters if all of them are valid UTF-8, and otherwise a U+FFFD for each of
    the bytes. So their text can only come when the row has ended.
    """

    def __init__(self, piece_of: Mapping[int, Piece | None], stripped: tuple[str, int]) -> None:
        """Take what each token adds to the text, and what is taken off its beginning.

        Args:
            piece_of: by token id; None where a token adds nothing.
            stripped: a character, and how many of it are taken off at most.
        """
        self._piece_of = piece_of
        self._stripped, self._num_to_strip = stripped
        self._bytes = bytearray()
        self._at_start = True

    def step(self, token_id: int) -> str:
        """See `TextStream`."""
        piece = self._piece_of[token_id]
        if piece is None:
            return ""
        at_start, self._at_start = self._at_start, False
        if piece.byte is not None:
            self._bytes.append(piece.byte)
            return ""
        text = piece.first if at_start else piece.later
        if self._bytes:
            text = self._take_bytes() + text
        return self._strip(text) if self._num_to_strip else text

    def finish(self) -> str:
        """See `TextStream`."""
        return self._strip(self._take_bytes())

    def _take_bytes(self) -> str:
        row = bytes(self._bytes)
        self._bytes.clear()
        try:
            return row.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(row)

    def _strip(self, text: str) -> str:
        """Take off what is left to be taken off the beginning of the whole text."""
        while text and self._num_to_strip:
            if not text.startswith(self._stripped):
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text


class WindowStream:
    """Text of tokens whose decoder is only known as a function of several of them.

    Shows what a token adds to the text of the few before it, and waits while that ends in U+FFFD. Equal to the
    decoded whole wherever a token's text depends on no more than those few.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._window: list[int] = []

    def step(self, token_id: int) -> str:
        """See `TextStream`."""
        self._window.append(token_id)
        return self._text_of_window(len(self._window) >= _WINDOW_TOKENS)

    def finish(self) -> str:
        """See `TextStream`."""
        return self._text_of_window(True)

    def _text_of_window(self, is_last: bool) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._window)
        if not is_last and (text.endswith(REPLACEMENT) or not text.startswith(before)):
            return ""
        self._context = (self._context + self._window)[-_CONTEXT_TOKENS:]
        self._window = []
        return text[len(before) :]
