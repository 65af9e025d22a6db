"""`tprt bench compare-hf`: tokens per second beside transformers' `generate`, on the same machine and model.

Both sides get the same prompts, the same number of new tokens, the same dtype and the same CPU threads in
all, and run one after the other in turns, so that a noisy minute hits both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from launch.devices import threads_per_rank
from launch.llm import LLM, raise_if_refused
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config
from tprt.errors import EngineDeadError
from tprt.messages import SamplingParams

_WAIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What each side generates: `batch` prompts of `prompt_len` tokens, `new_tokens` more of each."""

    batch: int
    prompt_len: int
    new_tokens: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Return fixed prompts that share no prefix."""
        return [
            [
                (31 * row + 7 * column + row * column) % (vocab_size - 100) + 50
                for column in range(self.prompt_len)
            ]
            for row in range(1, self.batch + 1)
        ]


def compare_with_hf(config: Config, workloads: Sequence[Workload], repeats: int) -> list[dict[str, float]]:
    """Run every workload on both sides `repeats` times; return medians and their ratio.

    Raises:
        EngineDeadError: one of the two sides failed.
    """
    rows = []
    vocab_size = read_checkpoint_config(config.model.path).vocab_size
    with _hf_peer(config) as peer, LLM(config) as llm:
        for workload in workloads:
            prompts = workload.prompts(vocab_size)
            theirs, ours = [], []
            for repeat in range(repeats + 1):
                their_s = _ask(peer, prompts, workload.new_tokens)
                our_s = time_run(llm, prompts, workload.new_tokens)
                if repeat > 0:  # the first round warms both up
                    theirs.append(their_s)
                    ours.append(our_s)
            tokens = workload.batch * workload.new_tokens
            rows.append(_row(workload, tokens / statistics.median(theirs), tokens / statistics.median(ours)))
    return rows


def _row(workload: Workload, theirs: float, ours: float) -> dict[str, float]:
    return {
        "batch": workload.batch,
        "prompt_len": workload.prompt_len,
        "new_tokens": workload.new_tokens,
        "transformers_tokens_per_s": round(theirs, 1),
        "tprt_tokens_per_s": round(ours, 1),
        "ratio": round(ours / theirs, 2),
    }


def time_run(llm: LLM, prompts: list[list[int]], new_tokens: int) -> float:
    """Return the seconds that `llm` takes for `new_tokens` more tokens of every prompt, greedily.

    Raises:
        InvalidRequestError: a prompt cannot be served.
        EngineDeadError: the deployment failed.
    """
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    started_s = time.perf_counter()
    llm.run(prompts, [sampling] * len(prompts), on_finished=raise_if_refused)
    return time.perf_counter() - started_s


@contextmanager
def _hf_peer(config: Config) -> Iterator[subprocess.Popen[str]]:
    """Start transformers in a process of its own, with all the threads that our ranks have together."""
    ranks = config.parallel.tensor_parallel_size
    threads = ranks * (config.runtime.num_threads or threads_per_rank(ranks))
    command = [
        sys.executable,
        "-m",
        "launch.bench.hf_peer",
        config.model.path,
        config.model.dtype,
        str(threads),
    ]
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # Ctrl-C in a terminal is for this process, which ends the peer.
    peer = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet, process_group=0
    )
    try:
        yield peer
    finally:
        peer.kill()
        peer.wait(_WAIT_S)


def _ask(peer: subprocess.Popen[str], prompts: list[list[int]], new_tokens: int) -> float:
    assert peer.stdin is not None
    assert peer.stdout is not None
    try:
        peer.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        peer.stdin.flush()
        answer = peer.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise EngineDeadError("the transformers process ended; its own message is above")
    return float(answer)
