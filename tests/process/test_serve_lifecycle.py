"""`tprt serve` starts, drains and ends in order, and whatever dies is named, replaced, or takes all with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from launch.serving.record import read_server
from launch.status import Signs, look_at
from tests.support.checkpoints import TinyModel
from tests.support.deployments import TPRT, TinyDeployment, descendants, make_tiny_deployment, still_there
from tests.support.otlp_receiver import otlp_receiver
from tests.support.serving import Served, make_certificate, save_word_tokenizer, tokens_of

pytestmark = pytest.mark.usefixtures("tmpdir_of_children")

PROMPT = [5, 6, 7]
ENDLESS = 60_000
# Where nothing depends on a second rank.
ONE_RANK = "parallel.tensor_parallel_size=1"


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> TinyDeployment:
    """A tiny deployment whose text tells the tokens."""
    folder = tmp_path_factory.mktemp("worded")
    model = TinyModel(heads=9, kv_heads=3)
    made = make_tiny_deployment(folder, model, 65536)
    save_word_tokenizer(folder, model.vocab_size)
    return made


def run_dir_of(folder: Path) -> Path:
    (run_dir,) = folder.glob("tprt-*")
    return run_dir


def signs_of(folder: Path) -> Signs:
    """Return what is to be seen of the deployment whose run directory is in `folder`."""
    status = look_at(run_dir_of(folder))
    assert status is not None
    return status.signs


def pids_of(folder: Path) -> dict[str, int]:
    """Return its processes by name."""
    signs = signs_of(folder)
    assert signs.record is not None
    assert signs.server is not None
    ranks = {f"rank {beat.rank}": beat.pid for beat in signs.beats}
    return {"coordinator": signs.record.pid, "server": signs.server.pid, **ranks}


def command_of(pid: int) -> str:
    """Return the command line of a process; "" once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def ranks_of(pid: int) -> list[int]:
    """Return the ranks among the processes that `pid` has started."""
    return [child for child in descendants(pid) if "worker_entry" in command_of(child)]


def num_running(folder: Path) -> int:
    """Return the requests that the coordinator has."""
    record = signs_of(folder).record
    assert record is not None
    return record.num_running + record.num_waiting


def test_it_refuses_until_the_ranks_are_ready_then_serves_and_drains_when_it_is_stopped(
    worded: TinyDeployment, tmpdir_of_children: Path
) -> None:
    with Served(worded.config) as served:
        served.wait_until(lambda: len(ranks_of(served.process.pid)) == 2)
        late_rank = ranks_of(served.process.pid)[1]
        os.kill(late_rank, signal.SIGSTOP)
        # The socket was there before them.
        early = served.complete(PROMPT, 3)
        assert (early[0], early[1]["retry-after"].isdecimal()) == (503, True)
        assert served.ask("GET", "/ready")[0] == 503
        os.kill(late_rank, signal.SIGCONT)
        served.wait_until_ready()
        assert served.ask("GET", "/ready")[0] == 200

        status, _, body = served.complete(PROMPT, 8)
        assert status == 200, body
        assert tokens_of(body["choices"][0]["text"]) == worded.expected(PROMPT, 8)

        pids = pids_of(tmpdir_of_children)
        record = read_server(run_dir_of(tmpdir_of_children))
        assert record is not None
        assert record.url == served.url
        assert record.url in subprocess.run(
            [TPRT, "status"], capture_output=True, text=True, timeout=60, check=False
        ).stdout.replace("\n", " ")
        assert "libtorch" in Path(f"/proc/{pids['rank 0']}/maps").read_text()
        assert "libtorch" not in Path(f"/proc/{pids['server']}/maps").read_text()

        stream = served.stream(PROMPT, 200)
        assert len(stream.read(3)) >= 3
        run_dir = run_dir_of(tmpdir_of_children)
        stopping = subprocess.Popen([TPRT, "stop", run_dir.name], stdout=subprocess.PIPE, text=True)
        served.wait_for_line("no new requests")
        served.wait_until(lambda: served.ask("GET", "/ready")[0] == 503)
        late = served.complete(PROMPT, 3)
        assert (late[0], late[1]["retry-after"].isdecimal()) == (503, True)
        assert served.ask("GET", "/health")[0] == 200
        assert stream.read() == worded.expected(PROMPT, 200)
        assert (stream.finish_reason, stream.is_done) == ("length", True)
        assert served.end() == 0, served.lines
    assert stopping.communicate(timeout=60)[0] == f"{run_dir}: {Path(worded.config).parent}: stopped\n"
    assert stopping.returncode == 0
    assert still_there(list(pids.values())) == []
    assert not [line for line in served.lines if "Traceback" in line]


def test_what_has_not_finished_at_the_end_of_the_drain_ends_with_what_it_has_and_so_does_its_span(
    worded: TinyDeployment,
) -> None:
    with otlp_receiver() as receiver:
        settings = [ONE_RANK, "server.drain_timeout_s=0.3", "logging.level=warning"]
        with Served(worded.config, *settings, f"server.otlp_traces_endpoint={receiver.endpoint}") as served:
            served.wait_until_ready()
            stream = served.stream(PROMPT, ENDLESS)
            stream.read(3)
            served.process.send_signal(signal.SIGINT)
            num_tokens = len(stream.read())
            assert 3 <= num_tokens < ENDLESS
            assert stream.finish_reason is not None
            assert served.end() == 0, served.lines
        (received,) = receiver.spans
    assert any("1 requests have not finished" in line for line in served.lines)
    assert received.resource["service.name"] == "tprt"
    assert received.attributes["gen_ai.usage.completion_tokens"] == num_tokens
    assert received.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    times = [
        received.attributes[f"gen_ai.latency.{name}"]
        for name in ("time_in_queue", "time_to_first_token", "e2e")
    ]
    assert 0 < times[0] < times[1] < times[2]


def test_a_second_signal_ends_at_once(worded: TinyDeployment) -> None:
    with Served(worded.config, ONE_RANK) as served:
        served.wait_until_ready()
        stream = served.stream(PROMPT, ENDLESS)
        stream.read(3)
        pids = descendants(served.process.pid)
        assert len(pids) == 3
        served.process.send_signal(signal.SIGTERM)
        served.wait_for_line("no new requests")
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 128 + signal.SIGTERM, served.lines
        stream.close()
    assert still_there(pids) == []


def test_a_rank_that_dies_is_a_pause_and_a_server_that_dies_is_started_again(
    worded: TinyDeployment, tmpdir_of_children: Path
) -> None:
    with Served(worded.config) as served:
        served.wait_until_ready()
        before = pids_of(tmpdir_of_children)
        stream = served.stream(PROMPT, 200)
        stream.read(10)
        os.kill(before["rank 1"], signal.SIGKILL)
        assert stream.read() == worded.expected(PROMPT, 200)
        assert (stream.finish_reason, stream.is_done) == ("length", True)

        lost = served.stream(PROMPT, ENDLESS)
        lost.read(3)
        os.kill(before["server"], signal.SIGKILL)
        # The socket is the launcher's: a request that comes meanwhile waits for the next server.
        served.wait_until(lambda: pids_of(tmpdir_of_children)["server"] != before["server"])
        served.wait_until(lambda: served.ask("GET", "/ready")[0] == 200)
        assert tokens_of(served.complete(PROMPT, 8)[2]["choices"][0]["text"]) == worded.expected(PROMPT, 8)
        lost.close()
        served.wait_until(lambda: num_running(tmpdir_of_children) == 0)
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0, served.lines


@pytest.mark.parametrize("victim", ["coordinator", "rank 0", "server"])
def test_a_death_that_is_not_made_good_is_named_and_ends_all(
    worded: TinyDeployment, tmpdir_of_children: Path, victim: str
) -> None:
    with Served(worded.config, ONE_RANK, "supervision.max_restarts=0") as served:
        served.wait_until_ready()
        stream = served.stream(PROMPT, ENDLESS)
        stream.read(3)
        pids = pids_of(tmpdir_of_children)
        os.kill(pids[victim], signal.SIGKILL)
        if victim != "server":
            stream.read()
            assert (stream.error, stream.is_done) == ("the engine has failed; the server's log says why", False)
        assert served.end() == 1, served.lines
        cause = f"{victim} (pid {pids[victim]}) was killed by SIGKILL"
        assert [cause in line for line in served.lines if "was killed" in line or "tprt: " in line][-1]
        assert sum("was killed by" in line for line in served.lines) == 1, served.lines
        stream.close()
    assert still_there(list(pids.values())) == []


def test_the_launchers_death_takes_all_with_it(worded: TinyDeployment, tmpdir_of_children: Path) -> None:
    with Served(worded.config, ONE_RANK) as served:
        served.wait_until_ready()
        pids = pids_of(tmpdir_of_children)
        served.process.kill()
        assert served.end() == -signal.SIGKILL
    assert len(pids) == 3
    assert still_there(list(pids.values())) == []


def test_with_certificate_and_key_it_speaks_tls_to_who_has_the_key_which_no_other_process_sees(
    worded: TinyDeployment, tmp_path: Path
) -> None:
    cert, key = make_certificate(tmp_path)
    settings = [ONE_RANK, f"server.ssl_certfile={cert}", f"server.ssl_keyfile={key}"]
    with Served(worded.config, *settings, environment={"TPRT_API_KEY": "sk-mine"}, trusted=cert) as served:
        assert served.url.startswith("https://")
        assert served.ask("GET", "/health")[0] == 200
        answers = [served.ask("GET", "/v1/models", key=key)[0] for key in (None, "sk-other", "sk-mine")]
        assert answers == [401, 401, 200]
        others = [pid for pid in descendants(served.process.pid) if "serving.entry" not in command_of(pid)]
        assert len(others) == 2
        assert not [pid for pid in others if b"sk-mine" in Path(f"/proc/{pid}/environ").read_bytes()]
        served.process.kill()
        served.end()
    assert not [line for line in served.lines if "sk-mine" in line]


def test_a_port_in_use_is_told_in_one_line_before_anything_is_started(worded: TinyDeployment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [TPRT, "serve", worded.config, "--port", str(port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert f"server.port {port}: cannot listen there: Address already in use" in line
