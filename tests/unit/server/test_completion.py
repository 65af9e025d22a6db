"""A completion turns tokens into text, and ends where its stop strings say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tprt.errors import CheckpointError, InvalidRequestError
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


def test_a_stop_string_that_never_comes_changes_nothing(tokenizer: Tokenizer) -> None:
    completion, _ = feed(tokenizer, "one two", stop=("three", "twos"))
    assert completion.text == "one two"
    assert not completion.finished


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


class TestChat:
    TEMPLATE = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )

    def test_messages_are_rendered_with_the_template_of_the_checkpoint(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(self.TEMPLATE)
        tokenizer = Tokenizer(str(folder))
        ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
        assert tokenizer.decode(ids) == "[user]hi>"

    def test_a_template_can_refuse_messages(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(InvalidRequestError, match="roles must alternate"):
            Tokenizer(str(folder)).encode_chat([{"role": "user", "content": "hi"}])

    def test_a_template_cannot_reach_python(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
        with pytest.raises(InvalidRequestError, match="unsafe"):
            Tokenizer(str(folder)).encode_chat([])

    def test_a_checkpoint_without_a_template_says_so(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequestError, match="no chat template"):
            tokenizer.encode_chat([{"role": "user", "content": "hi"}])

    def test_the_template_of_the_demo_model_renders_as_in_transformers(self) -> None:
        from transformers import AutoTokenizer

        folder = ".models/SmolLM2-135M-Instruct"
        chats = [
            [{"role": "user", "content": "Hi"}],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n there"}],
        ]
        theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
        for chat in chats:
            expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            assert ours.encode_chat(chat) == expected


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; give prompts as token ids"):
        Tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(str(tmp_path))
