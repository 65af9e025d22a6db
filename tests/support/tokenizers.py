"""Tokenizers small enough to read: a token for each character that is named, and one for the end."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = "<eos>"


def letters_tokenizer(tokens: Sequence[str]) -> str:
    """Return the tokenizer.json whose tokens are `tokens`, letters of which one may be `EOS`."""
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    text: str = tokenizer.to_str()
    return text


def byte_tokenizer() -> str:
    """Return a tokenizer.json of 257 tokens: `EOS` is 0, and every byte has one of its own."""
    return letters_tokenizer([EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
