"""A completion turns tokens into text, and ends where its stop strings say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tprt.errors import CheckpointError
from tprt.messages import FinishReason, SamplingParams
from tprt.server.completion import Completion
from tprt.server.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer: every byte is a token, so that characters are cut over several of them."""
    fast = FastTokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(BYTES)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<end>", special=True)])
    fast.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(str(folder))


def feed(tokenizer: Tokenizer | None, text: str, **sampling: object) -> tuple[Completion, list[str]]:
    """Give a completion the tokens of `text` one by one; return it and its text after each."""
    completion = Completion([1], SamplingParams(**sampling))  # type: ignore[arg-type]
    seen = []
    ids = tokenizer.encode(text) if tokenizer else [1, 2, 3]
    for token_id in ids:
        if completion.finished:
            break
        completion.append(token_id, tokenizer)
        seen.append(completion.text)
    return completion, seen


@pytest.mark.parametrize("text", ["plain", "Zoë 東京 🎉", "a\n\tb", "🏳️‍🌈"])
def test_text_grows_by_whole_characters_to_the_decoded_whole(tokenizer: Tokenizer, text: str) -> None:
    completion, seen = feed(tokenizer, text)
    completion.finish(FinishReason.LENGTH, tokenizer)
    assert completion.text == text
    assert all(text.startswith(part) for part in seen)
    assert completion.finish_reason == "length"


def test_an_unfinished_character_is_shown_as_it_is_at_the_end(tokenizer: Tokenizer) -> None:
    completion = Completion([1], SamplingParams())
    for token_id in tokenizer.encode("a東")[:-1]:
        completion.append(token_id, tokenizer)
    assert completion.text == "a"
    completion.finish(FinishReason.LENGTH, tokenizer)
    assert completion.text == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("ne t", "e"), "on"),
        ("aaab", ("aab",), "a"),
        ("one", ("one",), ""),
        ("日本語", ("本",), "日"),
    ],
)
def test_the_text_ends_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str
) -> None:
    completion, _ = feed(tokenizer, text, stop=stop)
    assert completion.text == expected
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "min_tokens", "expected"),
    [
        ("one", 2, ""),
        ("one", 3, "one two "),
        ("one", 11, "one two one two"),
        ("o o", 8, "one tw"),
        ("o o", 9, "one two one two"),
    ],
)
def test_a_stop_string_that_is_complete_within_min_tokens_does_not_count(
    tokenizer: Tokenizer, stop: str, min_tokens: int, expected: str
) -> None:
    completion, _ = feed(tokenizer, "one two one two", stop=(stop,), min_tokens=min_tokens)
    assert completion.text == expected
    assert completion.finished == (expected != "one two one two")


def test_a_stop_string_that_never_comes_changes_nothing(tokenizer: Tokenizer) -> None:
    completion, _ = feed(tokenizer, "one two", stop=("three", "twos"))
    assert completion.text == "one two"
    assert not completion.finished


def test_what_may_begin_a_stop_string_is_taken_only_when_it_is_known_not_to(tokenizer: Tokenizer) -> None:
    completion = Completion([1], SamplingParams(stop=("</end>",)))
    taken = []
    for token_id in tokenizer.encode("a</enough</e"):
        completion.append(token_id, tokenizer)
        taken.append(completion.take_text())
    assert taken == ["a", *[""] * 4, "</eno", "u", "g", "h", *[""] * 3]
    assert completion.text == "a</enough</e"
    completion.finish(FinishReason.LENGTH, tokenizer)
    assert completion.take_text() == "</e"
    assert completion.take_text() == ""


def test_what_is_taken_ends_before_the_stop_string(tokenizer: Tokenizer) -> None:
    completion, _ = feed(tokenizer, "one two three", stop=("two",))
    assert completion.take_text() == completion.text == "one "
    completion.finish(FinishReason.LENGTH, tokenizer)
    assert completion.take_text() == ""
    assert completion.stop_reason == "two"


def test_an_end_by_its_tokens_gives_all_that_was_held_back(tokenizer: Tokenizer) -> None:
    for reason in (FinishReason.LENGTH, FinishReason.ABORT, FinishReason.STOP):
        completion, _ = feed(tokenizer, "one tw", stop=("two",))
        assert completion.take_text() == "one "
        completion.finish(reason, tokenizer)
        assert completion.take_text() == "tw"
    failed, _ = feed(tokenizer, "one tw", stop=("two",))
    failed.error = "refused"
    assert failed.take_text() == "one tw"


def test_a_stop_string_can_be_complete_with_what_was_left_at_the_end(tokenizer: Tokenizer) -> None:
    completion = Completion([1], SamplingParams(stop=("\ufffd",)))
    for token_id in tokenizer.encode("a東")[:-1]:
        completion.append(token_id, tokenizer)
    completion.finish(FinishReason.LENGTH, tokenizer)
    assert (completion.text, completion.finish_reason) == ("a", "stop")


def test_a_token_that_ends_the_output_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    dot = tokenizer.encode(".")[0]
    completion, _ = feed(tokenizer, "one. two")
    completion.append(dot, tokenizer, ends_output=True)
    completion.finish(FinishReason.STOP, tokenizer)
    assert completion.token_ids[-1] == dot
    assert completion.text == "one. two"


def test_the_first_end_counts(tokenizer: Tokenizer) -> None:
    completion, _ = feed(tokenizer, "one two", stop=("two",))
    completion.finish(FinishReason.LENGTH, tokenizer)
    assert completion.finish_reason == "stop"
    assert completion.text == "one "


def test_special_tokens_are_tokens_but_no_text(tokenizer: Tokenizer) -> None:
    completion, _ = feed(tokenizer, "hi<end>")
    completion.finish(FinishReason.STOP, tokenizer)
    assert len(completion.token_ids) == 3
    assert completion.text == "hi"


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    completion, _ = feed(None, "")
    completion.finish(FinishReason.LENGTH, None)
    assert completion.token_ids == [1, 2, 3]
    assert completion.text == ""


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; give prompts as token ids"):
        Tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(str(tmp_path))


def test_half_a_surrogate_pair_and_ids_that_do_not_exist_are_no_error(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83cb")) == "a\ufffdb"
    assert tokenizer.decode([-1, 2**40, 10**6]) == ""
    assert tokenizer.token_text(2**40) == ""


def test_the_text_of_a_token_is_shown_with_what_is_half_a_character(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("東")
    assert tokenizer.token_bytes(first) == b"\xe6"
    assert tokenizer.token_text(first) == "\ufffd"
