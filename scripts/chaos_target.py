"""The deployment that is hurt: how it is started, and what it generates when nothing happens.

Knows nothing of faults.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.chaos_matrix import SHUTDOWN_GRACE_S, STALL_TIMEOUT_S, STARTUP_TIMEOUT_S, STEP_TIMEOUT_S

_SCRIPTS = Path(__file__).resolve().parent
_TPRT = Path(sys.executable).parent / "tprt"
_UNDISTURBED_S = 120.0
_SETTINGS = {
    "logging.level": "warning",
    "supervision.stall_timeout_s": STALL_TIMEOUT_S,
    "supervision.step_timeout_s": STEP_TIMEOUT_S,
    "supervision.startup_timeout_s": STARTUP_TIMEOUT_S,
    "supervision.shutdown_grace_s": SHUTDOWN_GRACE_S,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What is started: a configuration on two ranks, the prompts, and how many tokens each is to get."""

    config: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int

    def settings(self) -> list[str]:
        """Return the overrides, as after `--set`."""
        return [f"{key}={value}" for key, value in _SETTINGS.items()]

    def command(self) -> list[str]:
        """Return a command line that generates once."""
        ids = [part for prompt in self.prompts for part in ("--prompt-ids", ",".join(map(str, prompt)))]
        overrides = [part for setting in self.settings() for part in ("--set", setting)]
        sampling = ["--temperature", "0", "--max-tokens", str(self.max_tokens), "--ignore-eos", "--json"]
        return [str(_TPRT), "generate", self.config, *ids, *sampling, *overrides]

    def idling_command(self, notes: Path) -> list[str]:
        """Return a command line that generates, is idle, and generates again."""
        client = [sys.executable, str(_SCRIPTS / "chaos_client.py"), str(notes)]
        return [*client, self.config, str(self.max_tokens), json.dumps(self.prompts), *self.settings()]


def run_undisturbed(target: Target) -> list[list[int]]:
    """Return the tokens of each prompt when nothing happens.

    Raises:
        RuntimeError: it fails all the same.
    """
    ran = subprocess.run(target.command(), capture_output=True, text=True, timeout=_UNDISTURBED_S, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"the undisturbed run fails with exit code {ran.returncode}: {ran.stderr}")
    return [json.loads(line)["token_ids"] for line in ran.stdout.splitlines()]
