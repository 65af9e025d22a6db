"""Text comes token by token, final as it comes, and is the decoded whole at the end."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as FastTokenizer

from tests.support import trained_tokenizers as trained
from tprt.server.detokenizer import Detokenizer

SMOLLM2 = Path(".models/SmolLM2-135M-Instruct/tokenizer.json")
NAMES = [*trained.KINDS, "smollm2"]


@cache
def tokenizer_of(name: str) -> FastTokenizer:
    return FastTokenizer.from_file(str(SMOLLM2)) if name == "smollm2" else trained.KINDS[name]()


@cache
def detokenizer_of(name: str) -> Detokenizer:
    return Detokenizer(tokenizer_of(name))


@cache
def ids_of_bytes(name: str) -> list[int]:
    """The tokens that are single bytes or characters, of which what is cut and what is invalid is made."""
    tokenizer = tokenizer_of(name)
    lengths = {token_id: len(token) for token, token_id in tokenizer.get_vocab().items()}
    bytes_ = [i for token, i in tokenizer.get_vocab().items() if token.startswith("<0x")]
    return bytes_ or [token_id for token_id, length in lengths.items() if length == 1]


def pieces(name: str, ids: list[int]) -> list[str]:
    """What the stream gives for each token, and at the end."""
    stream = detokenizer_of(name).stream()
    return [*(stream.step(token_id) for token_id in ids), stream.finish()]


def available(name: str) -> str:
    if name == "smollm2" and not SMOLLM2.is_file():
        pytest.skip("the demo model is not there")
    return name


@pytest.mark.parametrize("name", NAMES)
def test_all_pieces_together_are_the_decoded_whole(name: str) -> None:
    tokenizer = tokenizer_of(available(name))
    any_id = st.integers(0, tokenizer.get_vocab_size() + 5)
    tokens = st.lists(st.sampled_from(ids_of_bytes(name)) | any_id, max_size=24)

    @settings(max_examples=250, deadline=None, database=None)
    @given(tokens)
    def check(ids: list[int]) -> None:
        assert "".join(pieces(name, ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    check()


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "byte_fallback_unstripped", "smollm2"])
def test_no_character_of_a_valid_text_is_ever_cut(name: str) -> None:
    tokenizer = tokenizer_of(available(name))

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.text(st.sampled_from(" aé本🎉\u200d👩x\n"), max_size=12) | st.sampled_from(trained.TEXTS))
    def check(text: str) -> None:
        came = pieces(name, tokenizer.encode(text).ids)
        assert not any("\ufffd" in piece for piece in came)
        assert "".join(came) == text

    check()


def tokens_of_bytes(name: str, data: bytes) -> list[int]:
    """One token for each byte of `data`."""
    detokenizer = detokenizer_of(name)
    by_byte = {detokenizer.token_bytes(token_id): token_id for token_id in ids_of_bytes(name)}
    return [by_byte[bytes([byte])] for byte in data]


def test_a_byte_level_character_comes_with_its_last_byte_and_an_invalid_byte_when_it_is_known_to_be() -> None:
    came = pieces("byte_level", tokens_of_bytes("byte_level", "a🎉".encode() + b"\xff\xe6\x9db\xe6\x9d"))
    assert came == ["a", "", "", "", "🎉", "\ufffd", "", "", "\ufffdb", "", "", "\ufffd"]


def test_byte_tokens_in_a_row_wait_for_its_end_because_one_that_is_invalid_spoils_them_all() -> None:
    valid = tokens_of_bytes("byte_fallback", "€".encode())
    spoilt = [*valid, *tokens_of_bytes("byte_fallback", b"\xff")]
    letter = tokenizer_of("byte_fallback").token_to_id("o")
    assert pieces("byte_fallback", [*valid, letter]) == ["", "", "", "€o", ""]
    assert pieces("byte_fallback", [*spoilt, letter]) == ["", "", "", "", "\ufffd" * 4 + "o", ""]


def test_only_the_first_space_of_all_is_taken_off() -> None:
    space = tokenizer_of("byte_fallback").token_to_id("▁")
    special = tokenizer_of("byte_fallback").token_to_id("<s>")
    assert pieces("byte_fallback", [special, space, special, space]) == ["", "", "", " ", ""]


def test_an_endless_run_of_invalid_bytes_does_not_hold_text_back_for_ever() -> None:
    came = pieces("byte_level", tokens_of_bytes("byte_level", b"\x80") * 1000)
    assert came[:-1] == ["\ufffd"] * 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_tokens_are_those_of_the_text(name: str) -> None:
    tokenizer = tokenizer_of(available(name))
    detokenizer = detokenizer_of(name)
    if name == "suffixed":
        pytest.skip("its tokens have no bytes of their own")
    text = "the quick brown fox"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(detokenizer.token_bytes, ids)).strip().decode() == text


def test_every_byte_has_a_token_and_a_special_token_the_bytes_of_its_name() -> None:
    for name in ("byte_level", "byte_fallback"):
        detokenizer = detokenizer_of(name)
        singles = {detokenizer.token_bytes(token_id) for token_id in ids_of_bytes(name)}
        assert {bytes([byte]) for byte in range(256)} <= singles
        assert detokenizer.token_bytes(tokenizer_of(name).token_to_id("<|user|>")) == b"<|user|>"
        assert (
            detokenizer.token_bytes(10**6)
            == detokenizer.token_bytes(-1)
            == detokenizer.token_bytes(2**40)
            == b""
        )


def test_a_decoder_that_is_known_as_a_whole_only_goes_through_a_window() -> None:
    fast = FastTokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    fast.add_tokens([AddedToken("x")])
    fast.decoder = decoders.CTC(pad_token="<unk>", cleanup=False)
    stream = Detokenizer(fast).stream()
    ids = [0, 1, 2] * 20
    assert "".join(map(stream.step, ids)) + stream.finish() == fast.decode(ids)
