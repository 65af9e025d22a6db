"""While a prompt is encoded other threads go on."""

from __future__ import annotations

import threading
import time

from tprt.server.tokenizer import Tokenizer


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
