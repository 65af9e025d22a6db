"""A short soak of the real server, and outputs of JSON schemas: everything that comes is as it must be.

The long ones are scripts/soak_server.py and scripts/check_structured_output.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import check_structured_output, soak_server
from tests.support.checkpoints import TinyModel
from tests.support.deployments import descendants, make_tiny_deployment, start, still_there

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
VOCAB_SIZE = 49152
START_S = 60.0
# Where nothing depends on a second rank.
ONE_RANK = ("--set", "parallel.tensor_parallel_size=1")
END_S = 30.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with the tokenizer and the chat template of a real one."""
    folder = tmp_path_factory.mktemp("soak")
    deployment = make_tiny_deployment(folder, TinyModel(heads=9, kv_heads=3, vocab_size=VOCAB_SIZE), 512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return deployment.config


@pytest.mark.usefixtures("tmpdir_of_children")
def test_a_soaked_server_is_as_before_and_has_answered_to_the_letter(config: str) -> None:
    options = ("--clients", "24", "--seconds", "5", "--cases", "12", "--max-tokens", "24")
    # The memory of libraries grows for longer than a test may take: only the long soak judges it.
    few_places = ("--set", "scheduler.max_num_seqs=8", "--set", "server.max_queued_requests=2")
    tally = soak_server.run(soak_server.parse([config, *options, *few_places, "--growth-mib", "inf"]))
    assert tally.violations == {}, tally.table()
    counts = tally.counts
    assert counts["streamed, equal to offline"] >= 10
    assert counts["announced 429"] >= 1
    assert counts["left in mid-stream or queue"] + counts["left before the headers"] >= 5
    assert sum(number for kind, number in counts.items() if kind.startswith("refused")) >= 5
    assert counts["checked: all requests ended, all KV blocks free"] == 1
    assert counts["checked: descriptors of server are flat"] == 1
    assert counts["checked: nothing is left behind"] == 1


@pytest.mark.usefixtures("tmpdir_of_children")
def test_outputs_of_json_schemas_parse_and_validate(config: str) -> None:
    count = 2 * len(check_structured_output.SCHEMAS)
    tally = check_structured_output.run(check_structured_output.parse([str(count), config, *ONE_RANK]))
    assert tally.violations == {}, tally.table()
    valid = {kind: number for kind, number in tally.counts.items() if kind.startswith("valid")}
    assert list(valid.values()) == [2] * len(check_structured_output.SCHEMAS)


def served_by(script: subprocess.Popen[str]) -> Path:
    """Wait until a server is among the processes of `script`; return the folder of its run directory."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and script.poll() is None:
        for pid in descendants(script.pid):
            # It may end at any moment.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"launch.serving.entry" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    return next(Path(os.fsdecode(one[7:])) for one in variables if one[:7] == b"TMPDIR=")
        time.sleep(0.02)
    script.kill()
    raise AssertionError(f"no server within {START_S} s: {script.communicate()[1]}")


@pytest.mark.usefixtures("tmpdir_of_children")
def test_a_soak_that_is_told_to_end_takes_its_server_along(config: str) -> None:
    options = ("--cases", "2", "--max-tokens", "4", "--set", "scheduler.max_num_seqs=8", *ONE_RANK)
    process = start([sys.executable, str(ROOT / "scripts" / "soak_server.py"), config, *options])
    try:
        folder = served_by(process)
        pids = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=END_S)
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert still_there(pids) == []
        assert not folder.exists()
    finally:
        process.kill()
        process.wait()
