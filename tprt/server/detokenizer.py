"""Finds out how the tokens of a tokenizer make text, so that it can come token by token.

A tokenizer's decoder is a chain of steps. Byte-level tokens are bytes of UTF-8. Chains that change each token
by itself, with or without byte tokens (`<0xE2>`), are applied to one token at a time. Chains of anything else
are left to a window of tokens. Knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from tokenizers.decoders import Decoder

from tprt.server.text_streams import ByteStream, Piece, PieceStream, TextStream, WindowStream

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Steps that change each token by itself, the first one perhaps in another way than those after it.
_BY_TOKEN = ("Replace", "Metaspace", "WordPiece", "Strip")
# Any token; what another adds after it is that token's text.
_SOME_TOKEN = "a"

# The library holds ids in 32 bits.
_MAX_ID = 2**32

_Step = dict[str, Any]
_Value = TypeVar("_Value")


class Detokenizer:
    """Text streams, and the bytes of single tokens, for one tokenizer."""

    def __init__(self, tokenizer: FastTokenizer, shown: Sequence[str] = ()) -> None:
        """Read the tokenizer's decoder; `shown` are tokens that have text even where they are special."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(
            token_id for token_id, token in added.items() if token.special and token.content not in shown
        )
        steps = _steps(tokenizer.decoder)
        self._is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        self._chain = _read_chain(steps)
        self._bytes_of = _Table(self._text_bytes)
        self._piece_of = _Table(self._piece)

    def stream(self) -> TextStream:
        """Return the stream of a new sequence; special tokens have no text."""
        if self._is_byte_level:
            return ByteStream(self._bytes_of)
        if self._chain is not None:
            return PieceStream(self._piece_of, self._chain.stripped)
        return WindowStream(lambda ids: self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for after other text; those of its name if it is special.

        An id that the tokenizer does not know has none.
        """
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < _MAX_ID else None
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self._is_byte_level:
            return _byte_level_bytes(token)
        if self._chain is None:
            return token.encode()
        piece = self._chain.piece(token)
        return piece.later.encode() if piece.byte is None else bytes([piece.byte])

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def _piece(self, token_id: int) -> Piece | None:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return None
        assert self._chain is not None
        return self._chain.piece(token)


class _Table(dict[int, _Value], Generic[_Value]):
    """Values by token id, each made when it is first asked for."""

    def __init__(self, make: Callable[[int], _Value]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> _Value:
        value = self[token_id] = self._make(token_id)
        return value


class _TokenDecoder(Protocol):
    def decode(self, tokens: list[str]) -> str: ...


@dataclass(frozen=True, slots=True)
class _Chain:
    """A decoder that changes each token by itself, then perhaps joins byte tokens and strips the beginning."""

    by_token: _TokenDecoder | None
    has_byte_tokens: bool
    stripped: tuple[str, int] = (" ", 0)

    def piece(self, token: str) -> Piece:
        """Return what `token` adds to a text."""
        first, later = token, token
        if self.by_token is not None:
            before = self.by_token.decode([_SOME_TOKEN])
            first = self.by_token.decode([token])
            later = self.by_token.decode([_SOME_TOKEN, token])[len(before) :]
        byte = _BYTE_TOKEN.fullmatch(later) if self.has_byte_tokens else None
        return Piece(first, later, None if byte is None else int(byte[1], 16))


class _Spaced:
    """What a tokenizer without a decoder does: a space between every two tokens."""

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def _steps(decoder: Decoder | None) -> list[_Step]:
    """Return the steps of a decoder's chain, as tokenizer.json describes them."""
    if decoder is None:
        return []
    step = json.loads(decoder.__getstate__())
    return _flat(step)


def _flat(step: _Step) -> list[_Step]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flat(part)]


def _read_chain(steps: Sequence[_Step]) -> _Chain | None:
    """Recognise (by token)* ByteFallback? (Fuse Strip?)?; return None for anything else."""
    if not steps:
        return _Chain(_Spaced(), False)
    if any(step.get("stop", 0) for step in steps):
        return None  # what is taken off the end is known at the end only
    names = [step["type"] for step in steps]
    num_by_token = next((i for i, name in enumerate(names) if name not in _BY_TOKEN), len(names))
    by_token = _make_decoder(steps[:num_by_token])
    rest = names[num_by_token:]
    has_byte_tokens = rest[:1] == ["ByteFallback"]
    rest = rest[has_byte_tokens:]
    if rest == ["Fuse", "Strip"]:
        return _Chain(by_token, has_byte_tokens, (steps[-1]["content"], steps[-1]["start"]))
    return _Chain(by_token, has_byte_tokens) if rest in ([], ["Fuse"]) else None


def _make_decoder(steps: Sequence[_Step]) -> Decoder | None:
    if not steps:
        return None
    blank = json.loads(FastTokenizer(models.BPE()).to_str())
    chain = {"type": "Sequence", "decoders": list(steps)}
    decoder: Decoder = FastTokenizer.from_str(json.dumps({**blank, "decoder": chain})).decoder
    return decoder


def _characters_of_bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    Bytes that print stand for themselves, and the others, in order, are characters from U+0100 on (GPT-2).
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _characters_of_bytes()


def _byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; an added token with characters of its own is its own text."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
