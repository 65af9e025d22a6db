"""`tprt chat` as a user has it: lines through a pipe, and a terminal with its keys."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import trained_tokenizers as trained
from tests.support.checkpoints import TinyModel
from tests.support.deployments import TPRT, TinyDeployment, make_tiny_deployment
from tprt.server.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
CTRL_C, CTRL_D = b"\x03", b"\x04"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> TinyDeployment:
    """A random model with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    deployment = make_tiny_deployment(folder, TinyModel(heads=9, kv_heads=3, vocab_size=340), 65536)
    trained.save(trained.byte_level(), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return deployment


@pytest.fixture(autouse=True)
def nothing_is_left_behind(talking: TinyDeployment, tmpdir_of_children: Path) -> Path:
    """Every test starts and ends without children, files and shared memory."""
    return tmpdir_of_children


def answer(talking: TinyDeployment, tokenizer: Tokenizer, messages: list[dict[str, str]], count: int) -> str:
    """What transformers says to `messages`."""
    tokens = talking.expected(tokenizer.encode_chat(messages), count)
    # The end-of-sequence token, 0, is one of text to this tokenizer, and still no part of an answer.
    return tokenizer.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)


def test_lines_through_a_pipe_are_a_conversation(talking: TinyDeployment) -> None:
    tokenizer = Tokenizer(str(Path(talking.config).parent))
    lines = [
        "/system Be brief.",
        "the fox",
        "",
        "/nonsense",
        "the dog",
        "the dog " * 100,
        "/clear",
        "/system",
        "the dog",
    ]
    ran = subprocess.run(
        [TPRT, "chat", talking.config, "--max-tokens", "12", "--set", "model.max_model_len=160"],
        input="\n".join([*lines, "/exit", "not sent"]).encode(),
        capture_output=True,
        timeout=WAIT_S,
        check=False,
    )
    noted = ran.stderr.decode()
    assert ran.returncode == 0, noted
    messages = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for text in ("the fox", "the dog"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(talking, tokenizer, messages, 12)})
        expected += messages[-1]["content"] + "\n"
    expected += answer(talking, tokenizer, [{"role": "user", "content": "the dog"}], 12) + "\n"
    assert ran.stdout.decode() == expected
    assert "there is no command /nonsense" in noted
    assert noted.count("tprt: with this message the conversation has") == 1
    assert "the context holds 160; /clear" in noted


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.shown = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvp(command[0], command)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait_for(self, text: str) -> None:
        """Wait until `text` is shown after what was waited for before."""
        self._read_until(lambda: text in self.shown, text)
        self.shown = self.shown.partition(text)[2]

    def type_until_shown(self, keys: bytes, text: str) -> None:
        """Type `keys`, again and again where the program was not yet listening, until `text` is shown."""
        while text not in self.shown:
            self.type(keys)
            if select.select([self._fd], [], [], 1.0)[0]:
                self.shown += os.read(self._fd, 4096).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def wait_for_characters(self, count: int) -> None:
        """Wait until so many more characters are shown."""
        self._read_until(lambda: len(self.shown) >= count, f"{count} characters")

    def _read_until(self, is_there: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not is_there():
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"{what!r} was never shown; there is {self.shown!r}"
            self.shown += os.read(self._fd, 4096).decode(errors="replace")

    def end(self) -> int:
        """Wait for the program's end; return its exit code."""
        try:
            while os.read(self._fd, 4096):
                pass
        except OSError:  # what a terminal says when nobody is left at the other end
            pass
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGTERM)
            self.end()
        os.close(self._fd)


@pytest.fixture
def terminal(talking: TinyDeployment) -> Iterator[Terminal]:
    terminal = Terminal([TPRT, "chat", talking.config, "--max-tokens", "60000"])
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(terminal: Terminal) -> None:
    terminal.wait_for("the context holds")
    terminal.wait_for("> ")
    terminal.type(b"the fox\r")
    terminal.wait_for("the fox\r\n")
    terminal.wait_for_characters(20)
    terminal.type(CTRL_C)
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type_until_shown(CTRL_C, "/exit or Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type(b"/help\r")
    terminal.wait_for("Ctrl-C stops an answer.")
    terminal.wait_for("> ")
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def test_a_checkpoint_without_a_template_is_refused_before_anything_starts(
    talking: TinyDeployment, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(talking.config).parent / name).read_bytes())
    command = [TPRT, "chat", talking.config, "--set", f"model.path={tmp_path}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, input="hi\n")
    assert ran.returncode == 2
    assert "has no chat template, which a conversation needs" in ran.stderr
    assert ran.stdout == ""
