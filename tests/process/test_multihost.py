"""One deployment over two hosts has the tokens of one, and a link that is cut is one failure with a name."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import Empty, Queue

import pytest

from launch.config_file import load_config
from launch.multihost.door import Door
from launch.multihost.identity import make_card
from tests.support.deployments import TinyDeployment, start
from tests.support.network_namespaces import TwoHosts, two_hosts

SECRET = {"TPRT_HOSTS_SECRET": "0123456789abcdef"}
HEARTBEAT_S = 5.0
# A whole start on a busy machine.
START_S = 100.0
PROMPTS = [[1, 2, 3], [7, 8], [4, 4, 4, 4]]
NUM_TOKENS = 60


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


def settings_of(endpoint: str, *more: str) -> list[str]:
    return [
        "hosts.nnodes=2",
        "hosts.nproc_per_node=[1, 2]",
        "parallel.tensor_parallel_size=3",
        f"hosts.rdzv_endpoint={endpoint}",
        f"hosts.heartbeat_timeout_s={HEARTBEAT_S}",
        "logging.level=warning",
        *more,
    ]


class Lines:
    """What a process prints, line by line, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.said: list[str] = []
        self._queue: Queue[str] = Queue()
        self._threads = [
            threading.Thread(target=self._read, args=(stream,)) for stream in (process.stdout, process.stderr)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Iterator[str]) -> None:
        for line in stream:
            self._queue.put(line.rstrip())

    def wait_for(self, words: str) -> str:
        """Return the next line that has `words`."""
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except Empty:
                raise AssertionError(f"{words!r} did not come; what came:\n" + "\n".join(self.said)) from None
            self.said.append(line)
            if words in line:
                return line

    def rest(self) -> list[str]:
        """Return all lines, once the process has ended."""
        for thread in self._threads:
            thread.join()
        while not self._queue.empty():
            self.said.append(self._queue.get())
        return self.said


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("tmpdir_of_children")
def test_two_hosts_give_the_tokens_of_one_and_go_on_after_a_cut_of_the_link(
    tiny: TinyDeployment, hosts: TwoHosts
) -> None:
    settings = settings_of(f"{hosts.addresses[0]}:29400", "scheduler.max_num_seqs=1")
    command = tiny.command(PROMPTS, NUM_TOKENS, *settings)
    with ExitStack() as stack:
        other = stack.enter_context(start(hosts.on(1, [*command, "--node-rank", "1"]), SECRET))
        first = stack.enter_context(start(hosts.on(0, command), SECRET))
        stack.callback(other.kill)
        stack.callback(first.kill)
        lines, others_lines = Lines(first), Lines(other)
        assert "10.213.77.1, port 29400; ranks use interface link0" in lines.wait_for("waits for the others")
        assert others_lines.wait_for("has joined with ranks 1, 2").endswith("ranks use interface link1")
        # One request is done, one runs, one waits.
        lines.wait_for("token_ids")
        hosts.cut()
        cut_s = time.monotonic()
        cause = lines.wait_for("starting the ranks again")
        assert time.monotonic() - cut_s < HEARTBEAT_S
        assert "node rank 1, " in cause
        assert "at 10.213.77.2 is lost: nothing has been heard of it for " in cause
        others_lines.wait_for("nothing has been heard of the host of node rank 0 for")
        hosts.restore()
        assert (first.wait(START_S), other.wait(START_S)) == (0, 0)
        said, others_said = lines.rest(), others_lines.rest()
    outputs = [json.loads(line)["token_ids"] for line in said if line.startswith("{")]
    assert outputs == [tiny.expected(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert [line for line in said if " is lost" in line or " is gone" in line] == [cause]
    assert others_said[-1] == "tprt: node rank 1: the deployment has ended"


def run(command: Sequence[str], secret: dict[str, str] = SECRET) -> tuple[int, list[str]]:
    """Return exit code and standard error of a program that ends by itself."""
    with start(command, secret) as process:
        _, said = process.communicate(timeout=START_S)
        return process.returncode, said.splitlines()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def command(tiny: TinyDeployment, listener: socket.socket) -> Callable[..., list[str]]:
    endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    return lambda *more: tiny.command([[1]], 1, *settings_of(endpoint, *more))


@pytest.mark.usefixtures("tmpdir_of_children")
def test_a_port_in_use_and_a_missing_secret_are_one_line_and_exit_code_2(
    command: Callable[..., list[str]],
) -> None:
    code, (line,) = run(command())
    assert (code, "cannot listen there: Address already in use" in line) == (2, True)
    code, (line,) = run(command(), {"TPRT_HOSTS_SECRET": ""})
    assert (code, "set hosts.secret_file or $TPRT_HOSTS_SECRET" in line) == (2, True)
    code, lines = run(command("hosts.node_rank=1", "hosts.join_timeout_s=0.5"))
    assert (code, "did not answer at 127.0.0.1" in lines[-1]) == (1, True)


@pytest.mark.usefixtures("tmpdir_of_children")
def test_a_host_that_never_comes_is_one_line_and_exit_code_1(
    command: Callable[..., list[str]], listener: socket.socket
) -> None:
    listener.close()
    code, lines = run(command("hosts.join_timeout_s=1"))
    (line,) = [line for line in lines if "waits for the others" not in line]
    assert code == 1
    assert "rendezvous: of 2 hosts, node ranks [1] did not come to 127.0.0.1:" in line
    assert "within 1 s (hosts.join_timeout_s)" in line


@pytest.mark.usefixtures("tmpdir_of_children")
@pytest.mark.parametrize(
    ("setting", "secret", "words"),
    [
        ("logging.level=error", "another secret of 16", "the secret of this host is not that of node rank 0"),
        ("cache.block_size=32", SECRET["TPRT_HOSTS_SECRET"], "cache.block_size is 32 on node rank 1 and 16 on"),
    ],
)
def test_a_host_that_does_not_belong_is_refused_with_exit_code_2(
    command: Callable[..., list[str]], listener: socket.socket, setting: str, secret: str, words: str
) -> None:
    _, _, path, *_ = arguments = command(setting, "hosts.node_rank=1")
    settings = settings_of(f"127.0.0.1:{listener.getsockname()[1]}")
    own = make_card(load_config(path, settings))
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(run, arguments, {"TPRT_HOSTS_SECRET": secret})
        door = Door(listener, own, 2, SECRET["TPRT_HOSTS_SECRET"].encode())
        while not ending.done():
            assert door.admit({}) == []
            time.sleep(0.02)
        door.close()
        code, lines = ending.result()
    assert code == 2
    assert lines[-1].startswith("tprt: the host of node rank 0 at 127.0.0.1 refuses this host: ")
    assert words in lines[-1]
