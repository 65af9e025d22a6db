"""The batch scripts of the docs run under Slurm, with the tokens of transformers, and end in order."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import TinyModel
from tests.support.deployments import TinyDeployment, make_tiny_deployment, still_there
from tests.support.serving import save_word_tokenizer, tokens_of
from tests.support.slurm_cluster import SlurmCluster, slurm_cluster

DOCS = Path(__file__).parents[2] / "docs/multi-host.md"
PROMPT = [5, 6, 7]
# A whole start on a busy machine, and the end of a job.
START_S = 90.0
END_S = 25.0
# Its arguments are a URL and what is posted there; it prints the answer.
POST = """
import sys, urllib.request
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> TinyDeployment:
    """A deployment whose texts tell their tokens, as `model.yaml` in a folder."""
    folder = tmp_path_factory.mktemp("worded")
    model = TinyModel(heads=9, kv_heads=3)
    deployment = make_tiny_deployment(folder, model)
    save_word_tokenizer(folder, model.vocab_size)
    Path(deployment.config).rename(folder / "model.yaml")
    return TinyDeployment(str(folder / "model.yaml"), deployment.model)


def script_of_docs(number: int) -> str:
    """Return one of the batch scripts in the docs."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    blocks = itertools.groupby(lines, lambda line: line.startswith("    "))
    texts = [textwrap.dedent("\n".join(block)) for is_code, block in blocks if is_code]
    return [text + "\n" for text in texts if "#SBATCH" in text][number]


def wait_until_ready(cluster: SlurmCluster, job: int, out: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while not out.exists() or "tprt: ready: serving" not in out.read_text():
        assert cluster.state_of(job) in ("PENDING", "RUNNING"), out.read_text()
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def ask(cluster: SlurmCluster, num_tokens: int) -> subprocess.Popen[str]:
    """Send a request from the first node."""
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    url = "http://127.0.0.1:8000/v1/completions"
    command = cluster.hosts.on(0, [sys.executable, "-c", POST, url, json.dumps(body)])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def tokens_from(asked: subprocess.Popen[str]) -> list[int]:
    answer, _ = asked.communicate(timeout=START_S)
    return tokens_of(json.loads(answer)["choices"][0]["text"])


def test_with_a_task_for_each_host_scancel_lets_requests_finish_and_leaves_nothing(
    cluster: SlurmCluster, worded: TinyDeployment, tmpdir_of_children: Path
) -> None:
    folder = Path(worded.config).parent
    job = cluster.submit(script_of_docs(0), folder, gpus_per_node=1)
    wait_until_ready(cluster, job, folder / "job.out")
    assert tokens_from(ask(cluster, 8)) == worded.expected(PROMPT, 8)
    asked = ask(cluster, 100)
    time.sleep(0.5)
    cluster.run("scancel", str(job))
    assert tokens_from(asked) == worded.expected(PROMPT, 100)
    assert cluster.wait_for_end(job, END_S) == "CANCELLED"
    assert "tprt: node rank 1: the deployment has ended" in (folder / "job.out").read_text()
    assert still_there(cluster.processes_of_jobs()) == []


def test_with_a_task_for_each_rank_one_that_dies_is_one_cause_and_ends_the_job(
    cluster: SlurmCluster, worded: TinyDeployment, tmpdir_of_children: Path
) -> None:
    folder = Path(worded.config).parent
    job = cluster.submit(script_of_docs(1), folder, ntasks_per_node=2, gpus_per_node=2)
    wait_until_ready(cluster, job, folder / "job.out")
    assert tokens_from(ask(cluster, 8)) == worded.expected(PROMPT, 8)
    (pid,) = cluster.processes_of_jobs("SLURM_PROCID=3")
    os.kill(pid, signal.SIGKILL)
    assert cluster.wait_for_end(job, END_S) == "FAILED"
    said = (folder / "job.out").read_text()
    (cause,) = [line for line in said.splitlines() if line.startswith("tprt: rank ")]
    assert cause.startswith("tprt: rank 3 "), said
    assert "ended without a report" in cause, said
    assert still_there(cluster.processes_of_jobs()) == []
