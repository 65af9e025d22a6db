"""The tokenizer of a checkpoint folder, where it has one.

Knows nothing of what is tokenized.
"""

from __future__ import annotations

from pathlib import Path

from tprt.server.tokenizer import Tokenizer


def open_tokenizer(folder: str) -> Tokenizer | None:
    """Return the tokenizer in `folder`, or None where there is no tokenizer.json.

    Raises:
        CheckpointError: there is one, and it cannot be read.
    """
    return Tokenizer(folder) if (Path(folder) / "tokenizer.json").is_file() else None
