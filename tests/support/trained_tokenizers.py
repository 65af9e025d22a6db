"""Tokenizers of every kind, trained on a few lines in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not jump over the fox",
    "Zoë fährt über die Brücke, naïve café",
    "東京は日本の首都です。日本語の文字",
    "don't, isn't; we're (they've) it's all 1234 5.67",
    "🎉🎊 party 🎉 👩‍👩‍👧 🏳️‍🌈",
    "  two  spaces\n\n\tand lines  ",
]
_SPECIAL = ("<s>", "</s>")
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """Bytes and what BPE makes of them, as in GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    return _trained(tokenizer, trainer)


def byte_fallback() -> Tokenizer:
    """Pieces of text, and bytes for what is in none of them, as in Llama 2; the first space is taken off."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *_SPECIAL, *_BYTE_TOKENS]
    size = len(special) + 120
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, limit_alphabet=40, show_progress=False
    )
    return _trained(tokenizer, trainer)


def byte_fallback_unstripped() -> Tokenizer:
    """As in Gemma: spaces stay as they are."""
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Pieces with likelihoods, as in T5 and XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", *_SPECIAL], unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def word_piece() -> Tokenizer:
    """Words and their parts, with clean-up of the space before marks, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", *_SPECIAL], show_progress=False
    )
    return _trained(tokenizer, trainer)


def words() -> Tokenizer:
    """Whole words, and no decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", *_SPECIAL], show_progress=False)
    return _trained(tokenizer, trainer)


def suffixed() -> Tokenizer:
    """Words end with a mark that becomes a space between them, as in GPT-1: no token's text is known alone."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>", show_progress=False)
    return _trained(tokenizer, trainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (byte_level, byte_fallback, byte_fallback_unstripped, unigram, word_piece, words, suffixed)
}


def add_tool_call_tags(tokenizer: Tokenizer) -> Tokenizer:
    """Make the tags of tool calls tokens, as in Qwen."""
    tags = ("<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write tokenizer.json into `folder`; return the folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    """Train; special are then the ends of sequences, and one that stands for a role."""
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer = _without_special_bytes(tokenizer)
    tokenizer.add_special_tokens([*_SPECIAL, "<|user|>"])
    return tokenizer


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Make byte tokens ordinary ones; a trainer takes them as special tokens only."""
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in _BYTE_TOKENS]
    return Tokenizer.from_str(json.dumps(described))
