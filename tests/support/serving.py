"""`tprt serve` as a process for tests: its address, its standard error, and streams of its completions."""

from __future__ import annotations

import http.client
import json
import queue
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.support.deployments import TPRT, start

WAIT_S = 60.0


def save_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer whose token `t` is the word `w<t>`, so that a text tells its tokens."""
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def tokens_of(text: str) -> list[int]:
    """Return the tokens of a text of `save_word_tokenizer`."""
    return [int(word.removeprefix("w")) for word in text.split()]


def make_certificate(folder: Path) -> tuple[str, str]:
    """Make a certificate of 127.0.0.1 that signs itself; return its file and that of its key."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command = ["openssl", "req", "-x509", *kind, *subject, "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return cert, key


class Stream:
    """A streamed completion, read event by event."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._response = connection.getresponse()
        self.status = self._response.status
        self.text = ""
        self.finish_reason: str | None = None
        self.is_done = False
        self.error: str | None = None

    def read(self, num_tokens: int | None = None) -> list[int]:
        """Read until there are so many tokens, or to the end of the connection; return all tokens.

        Raises:
            OSError, http.client.IncompleteRead: the connection was cut.
        """
        for event in self._events():
            if event == "[DONE]":
                self.is_done = True
                continue
            content = json.loads(event)
            if "error" in content:
                self.error = content["error"]["message"]
                continue
            (choice,) = content["choices"]
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            if num_tokens is not None and len(tokens_of(self.text)) >= num_tokens:
                break
        return tokens_of(self.text)

    def close(self) -> None:
        self._connection.close()

    def _events(self) -> Iterator[str]:
        while line := self._response.readline():
            if line.startswith(b"data: "):
                yield line.decode().removeprefix("data: ").strip()


class Served:
    """A running `tprt serve`; killed at the end if it still runs."""

    def __init__(
        self,
        config: str,
        *settings: str,
        environment: Mapping[str, str] | None = None,
        trusted: str | None = None,
    ) -> None:
        """Start it; `trusted` is the certificate that its clients trust, where it has one."""
        overrides = [part for setting in settings for part in ("--set", setting)]
        self.process = start([TPRT, "serve", config, "--port", "0", *overrides], environment)
        self.lines: list[str] = []
        self._coming: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url, self.host, port = self.wait_for_line(r"listening on (https?://([\d.]+):(\d+))")
        self.port = int(port)
        self._tls = None if trusted is None else ssl.create_default_context(cafile=trusted)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._coming.put(line.rstrip("\n"))
        self._coming.put(None)

    def wait_for_line(self, pattern: str) -> tuple[str, ...]:
        """Return the groups of the first line that has the pattern, of those not looked at yet."""
        while (line := self._coming.get(timeout=WAIT_S)) is not None:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found.groups()
        raise AssertionError(f"no line has {pattern!r}: {self.lines}")

    def wait_until_ready(self) -> None:
        self.wait_for_line("ready: serving")

    def connect(self) -> http.client.HTTPConnection:
        if self._tls is not None:
            return http.client.HTTPSConnection(self.host, self.port, timeout=WAIT_S, context=self._tls)
        return http.client.HTTPConnection(self.host, self.port, timeout=WAIT_S)

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, key: str | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and JSON body of an answer."""
        connection = self.connect()
        try:
            headers = {"Content-Type": "application/json"}
            if key is not None:
                headers["Authorization"] = f"Bearer {key}"
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
            fields = {name.lower(): value for name, value in response.headers.items()}
            return response.status, fields, json.loads(content or "null")
        finally:
            connection.close()

    def complete(self, prompt: list[int], max_tokens: int) -> tuple[int, dict[str, str], Any]:
        return self.ask("POST", "/v1/completions", _body(prompt, max_tokens))

    def stream(self, prompt: list[int], max_tokens: int) -> Stream:
        connection = self.connect()
        body = json.dumps({**_body(prompt, max_tokens), "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return Stream(connection)

    def end(self) -> int:
        """Wait for the end and return the exit code; `lines` has all of standard error then."""
        exit_code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        while (line := self._coming.get(timeout=WAIT_S)) is not None:
            self.lines.append(line)
        return exit_code

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError("it does not end") from error
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            self._reader.join(WAIT_S)
            pipe.close()


def _body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
