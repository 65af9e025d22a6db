"""The soak script: it passes over a sound ring, and it does notice a message that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tprt.transport.hub import ShmWorkerHub

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "scripts" / "soak_ring.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_it_passes_over_a_sound_ring() -> None:
    command = [*COMMAND, "--messages", "3000", "--readers", "2", "--stall", "0.003", "--large", "0.01"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "reader 0: 3,000 messages, one way p50" in done.stdout
    assert "reader 1: 3,000 messages, one way p50" in done.stdout


def test_it_notices_a_message_that_is_wrong() -> None:
    with tempfile.TemporaryDirectory(prefix="tprt-test-") as folder:
        hub = ShmWorkerHub.listen(f"{folder}/hub", epoch=0, world_size=1)
        command = [*COMMAND, "--messages", "2", "--be-reader", f"{folder}/hub", "0"]
        with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as reader:
            hub.accept_all(20.0)
            hub.steps.send([(1).to_bytes(8, "little"), bytes(8)], 20.0)
            _, said = reader.communicate(timeout=20)
        hub.close()
    assert reader.returncode == 1
    assert "reader 0: message 0 is wrong" in said
