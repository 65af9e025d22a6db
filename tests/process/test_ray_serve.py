"""The example for Ray Serve serves, with a deployment of tprt in each replica; skipped without Ray."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import TinyModel
from tests.support.deployments import descendants, make_tiny_deployment, still_there
from tests.support.serving import save_word_tokenizer, tokens_of

pytest.importorskip("ray.serve")

SCRIPT = Path(__file__).parents[2] / "scripts" / "ray_serve.py"
WAIT_S = 100.0
PROMPT, NUM_TOKENS = [5, 6, 7], 20


def free_port() -> int:
    """Return a port that is free now; Ray takes no socket, and does not tell which port 0 became."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def complete(port: int, **more: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True} | more
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.mark.timeout(300)
def test_ray_serve_serves_and_leaves_nothing(tmp_path: Path) -> None:
    tiny = make_tiny_deployment(tmp_path, TinyModel(vocab_size=200))
    save_word_tokenizer(tmp_path, 200)
    port, expected = free_port(), tiny.expected(PROMPT, NUM_TOKENS)
    settings = ["--set", "parallel.tensor_parallel_size=1"]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), tiny.config, "--num-replicas", "2", "--port", str(port), *settings],
            env={**os.environ, "RAY_TMPDIR": folder, "TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert any("2 replicas serve" in line for line in process.stdout)
            for _ in range(4):
                status, text = complete(port)
                assert status == 200, text
                assert tokens_of(json.loads(text)["choices"][0]["text"]) == expected
            status, text = complete(port, stream=True)
            events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: {")]
            assert tokens_of("".join(json.loads(event)["choices"][0]["text"] for event in events)) == expected
            assert complete(port, prompt=[])[0] == 400
            children = descendants(process.pid)
            ours = {pid for pid in children if b"launch" in Path(f"/proc/{pid}/cmdline").read_bytes()}
            assert len(ours) == 2 * len(("launcher", "server", "coordinator", "rank"))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=WAIT_S)
        left = still_there(children)
        for pid in left:
            # Ray's own agents notice only after a while that they are alone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not ours & set(left)
        assert list(Path(folder).glob("tprt-*")) == []
