"""Text to token ids and back, and chat messages to prompts, from a checkpoint's own files.

Stands on `tokenizers` and `jinja2` rather than on transformers: they import in a tenth of a second and never
reach torch. Knows nothing of requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from tprt.errors import CheckpointError, InvalidRequestError

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of one checkpoint folder."""

    def __init__(self, folder: str) -> None:
        """Read tokenizer.json and, where there are any, tokenizer_config.json and chat_template.jinja.

        Raises:
            CheckpointError: there is no tokenizer.json, or a file cannot be read.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; give prompts as token ids (--prompt-ids), or add the file"
            )
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._settings = _read_settings(Path(folder) / "tokenizer_config.json")
        self._template = _chat_template(Path(folder), self._settings)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def decode_stream(self) -> TextStream:
        """Return a stream that turns one token after another into text."""
        return TextStream(self._tokenizer)

    def encode_chat(self, messages: Sequence[Message], **template_arguments: object) -> list[int]:
        """Render `messages` (`role`, `content`) with the chat template, ready for the assistant's answer.

        Raises:
            InvalidRequestError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError("this checkpoint has no chat template; send a plain prompt instead")
        try:
            text = (
                self._environment()
                .from_string(self._template)
                .render(
                    messages=messages,
                    add_generation_prompt=True,
                    **_special_tokens(self._settings),
                    **template_arguments,
                )
            )
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def _environment(self) -> ImmutableSandboxedEnvironment:
        """Set jinja up as chat templates expect it (Hugging Face, "Chat templates")."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        return environment


class TextStream:
    """Turns token ids into text as they come; a character cut over two tokens waits for the second."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """Return the text that `token_id` completes, often one word, sometimes none."""
        return self._stream.step(self._tokenizer, token_id) or ""


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and its like as text; a settings file holds text or an object with `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _to_json(value: object, indent: int | None = None) -> str:
    """Dump without escaping HTML, which jinja's own filter does."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
