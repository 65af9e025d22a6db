"""Deployments of tiny checkpoints for tests, and what is still there after one has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from tests.support.checkpoints import TinyModel, reference_tokens, save_tiny

TPRT = str(Path(sys.executable).parent / "tprt")
_GONE_S = 5.0
Item = TypeVar("Item", int, str)


@dataclass(frozen=True)
class TinyDeployment:
    """A YAML file of a tiny checkpoint on two CPU ranks, and transformers' model of it."""

    config: str
    model: PreTrainedModel

    def expected(self, prompt: list[int], count: int) -> list[int]:
        return reference_tokens(self.model, prompt, count)

    def command(self, prompts: Sequence[list[int]], max_tokens: int, *settings: str) -> list[str]:
        """Return a command line that generates greedily and prints JSON."""
        ids = [part for prompt in prompts for part in ("--prompt-ids", ",".join(map(str, prompt)))]
        overrides = [part for setting in settings for part in ("--set", setting)]
        sampling = ["--temperature", "0", "--max-tokens", str(max_tokens), "--ignore-eos", "--json"]
        return [TPRT, "generate", self.config, *ids, *sampling, *overrides]


def make_tiny_deployment(folder: Path, tiny: TinyModel, max_model_len: int = 256) -> TinyDeployment:
    """Write checkpoint and YAML file into `folder`; sequences may have `max_model_len` tokens."""
    model = save_tiny(folder, tiny)
    checkpoint = folder / "config.json"
    settings = json.loads(checkpoint.read_text())
    checkpoint.write_text(json.dumps({**settings, "max_position_embeddings": max_model_len}))
    config = folder / "tiny.yaml"
    config.write_text(
        f"model: {{path: {folder}, dtype: float32}}\nparallel: {{tensor_parallel_size: 2}}\n"
        "runtime: {device: cpu, num_threads: 1}\nlogging: {level: error}\n"
        f"cache: {{num_blocks: {max_model_len // 16 + 64}}}\n"
    )
    return TinyDeployment(str(config), model)


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a program in a process group of its own, as a shell does."""
    return subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` has started, and those that they have."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found + [deeper for child in found for deeper in descendants(child)]


def still_there(pids: Sequence[int]) -> list[int]:
    """Return which of `pids` are still there, after they have had a moment to go."""
    return _left_behind(lambda: [pid for pid in pids if Path(f"/proc/{pid}").exists()])


def still_in(folder: Path) -> list[str]:
    """Return the names in `folder`, after whoever is to remove them has had a moment to."""
    return _left_behind(lambda: os.listdir(folder))


def shared_memory() -> set[str]:
    """Return the names in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def new_shared_memory(before: set[str]) -> list[str]:
    """Return the names in /dev/shm that are not in `before`, once those of other tests have had time to go."""
    return _left_behind(lambda: shared_memory() - before)


def _left_behind(look: Callable[[], Collection[Item]]) -> list[Item]:
    """Return what `look` still finds when it has had time to go."""
    deadline_s = time.monotonic() + _GONE_S
    while (left := look()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return sorted(left)
