"""A prompt is encoded whole, and while that takes its time other threads go on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from tests.support.fake_server import save_byte_tokenizer
from tprt.server.tokenizer import Tokenizer


def test_how_a_tokenizer_cut_and_filled_samples_in_training_does_not_touch_a_prompt(tmp_path: Path) -> None:
    file = save_byte_tokenizer(tmp_path) / "tokenizer.json"
    fast = FastTokenizer.from_file(str(file))
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    fast.save(str(file))
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a long prompt")) == "a long prompt"
    assert len(tokenizer.encode("ab")) == 2


def test_a_long_text_is_encoded_while_other_threads_go_on(byte_tokenizer: Tokenizer) -> None:
    text = "some words " * 50_000
    encoding = threading.Thread(target=byte_tokenizer.encode, args=(text,))
    encoding.start()
    num_turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        num_turns += 1
    # One that is shut out meanwhile has one or two.
    assert num_turns > 8
