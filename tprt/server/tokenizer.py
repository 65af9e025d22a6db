"""Text to token ids and back, and chat messages to prompts, from a checkpoint's own files.

Stands on `tokenizers` and `jinja2` rather than on transformers: they import in a tenth of a second and never
reach torch. Knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from tprt.errors import CheckpointError, InvalidRequestError
from tprt.server.chat_template import Message, read_chat_template
from tprt.server.detokenizer import Detokenizer
from tprt.server.text_streams import TextStream
from tprt.server.tool_calls import CLOSE_TAG, OPEN_TAG, ToolCallStyle
from tprt.server.tool_grammar import ToolTags

# The library holds ids in 32 bits.
_MAX_ID = 2**32
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

__all__ = ["Message", "Tokenizer"]


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
        # How training cut and filled its samples is saved with the tokenizer, and means nothing for a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Some checkpoints have them as special tokens, but calls are found by them.
        self._detokenizer = Detokenizer(self._tokenizer, shown=(OPEN_TAG, CLOSE_TAG))
        settings = _read_settings(Path(folder) / "tokenizer_config.json")
        self._template = read_chat_template(Path(folder), settings)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; halves of surrogate pairs, which JSON can hold, count as U+FFFD."""
        text = _LONE_SURROGATES.sub("\ufffd", text)
        # Unlike `encode` it lets other threads run meanwhile, and it leaves the places in the text away.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens and ids that the tokenizer does not have left out."""
        known = [token_id for token_id in token_ids if 0 <= token_id < _MAX_ID]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def decode_stream(self) -> TextStream:
        """Return a stream that turns one token after another into text."""
        return self._detokenizer.stream()

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_arguments: object,
    ) -> list[int]:
        """Render `messages` (`role`, `content`) with the chat template, ready for the assistant's answer.

        Args:
            messages: as OpenAI's API has them, those with `tool_calls` and those of role `tool` among them.
            tools: OpenAI's tool objects; they are the template's to describe.
            template_arguments: further variables of the template, as `enable_thinking`;
                `add_generation_prompt=False` leaves the beginning of the answer away.

        Raises:
            InvalidRequestError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError("this checkpoint has no chat template; send a plain prompt instead")
        text = self._template.render(messages, tools, template_arguments)
        return self.encode(text, add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Tell whether `encode_chat` is possible."""
        return self._template is not None

    @property
    def tool_call_style(self) -> ToolCallStyle | None:
        """How this model writes tool calls; None where its template has none, or in a style not known here."""
        return None if self._template is None else self._template.tool_call_style

    @property
    def tool_tags(self) -> ToolTags:
        """Whether the tags of tool calls in the style of Hermes are tokens of their own."""
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        return "tokens" if {OPEN_TAG, CLOSE_TAG} <= added else "text"

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token after other text; those of its name if it is special.

        An id that the tokenizer does not have gives none.
        """
        return self._detokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; bytes that alone are no character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}
