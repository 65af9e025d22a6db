"""Whole deployments beside each other on one machine, and where there is next to nothing to write to."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import LLM, SamplingParams
from tests.support.deployments import TinyDeployment, start

NUM_TOKENS = 12
WAIT_S = 100.0


def greedy(max_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.usefixtures("tmpdir_of_children")
def test_four_deployments_that_start_at_once_do_not_collide_and_give_their_own_tokens(
    tiny: TinyDeployment,
) -> None:
    prompts = [[5 + number, 6, 7] for number in range(4)]
    expected = [tiny.expected(prompt, NUM_TOKENS) for prompt in prompts]
    assert len(set(map(tuple, expected))) == 4, "every deployment has tokens of its own to give"
    sizes = [2, 2, 1, 1]
    running = [
        start(tiny.command([prompt], NUM_TOKENS, f"parallel.tensor_parallel_size={size}"))
        for prompt, size in zip(prompts, sizes, strict=True)
    ]
    try:
        ended = [process.communicate(timeout=WAIT_S) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * 4, [errors for _, errors in ended]
    assert [json.loads(output)["token_ids"] for output, _ in ended] == expected


@pytest.fixture(scope="module")
def two(tiny: TinyDeployment) -> Iterator[list[LLM]]:
    """Two deployments of one configuration, started at once by threads that have ended since."""
    llms: list[LLM] = []
    threads = [threading.Thread(target=lambda: llms.append(LLM(tiny.config))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        yield llms
    finally:
        for llm in llms:
            llm.close()


class TestTwoInOneProcess:
    """Deployments that share a Python process share nothing else."""

    def test_each_lives_on_after_the_thread_that_made_it_and_gives_the_right_tokens(
        self, tiny: TinyDeployment, two: list[LLM]
    ) -> None:
        assert len(two) == 2
        assert not set(two[0].pids.values()) & set(two[1].pids.values())
        for prompt in ([5, 6, 7], [9, 8]):
            for llm in two:
                output = llm.generate(prompt, greedy())[0].outputs[0]
                assert output.token_ids == tiny.expected(prompt, NUM_TOKENS)

    def test_the_end_of_one_leaves_the_other_at_work(self, tiny: TinyDeployment, two: list[LLM]) -> None:
        two[0].close()
        assert not [pid for pid in two[0].pids.values() if Path(f"/proc/{pid}").exists()]
        output = two[1].generate([7, 7], greedy())[0].outputs[0]
        assert output.token_ids == tiny.expected([7, 7], NUM_TOKENS)


@pytest.mark.usefixtures("tmpdir_of_children")
def test_ranks_that_hold_different_numbers_of_blocks_work_with_the_fewest(tiny: TinyDeployment) -> None:
    heavy_block_bytes = 2 * 16 * 2 * 2 * 16 * 4  # layers, tokens, keys and values, KV heads, head_dim, float32
    memory_gib = 20.5 * heavy_block_bytes / 2**30  # 20 blocks with 2 KV heads, 41 with 1
    settings = [f"cache.cpu_memory_gib={memory_gib}", "cache.num_blocks=null"]
    prompts = [[number, 3, 4] for number in range(20, 26)]
    with LLM(tiny.config, settings) as llm:
        assert llm.ready.num_blocks == 20
        # 6 sequences of 80 tokens need 30 blocks: a rank that counted its own would write past the other's.
        outputs = llm.generate(prompts, greedy(77))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == tiny.expected(prompt, 77)


# What a private view of the mounts is made of before "$@" runs in it. Each is checked first: where something
# else can be written, or executed, the test would prove nothing.
READ_ONLY = """
mount -t tmpfs -o size=1m tmpfs /dev/shm
while read -r _ _ _ _ point _; do
    case $point in /proc*|/dev/shm) ;; *) mount -o remount,bind,ro "$point" || true ;; esac
done < /proc/self/mountinfo
for folder in /tmp /var/tmp /run /dev . "${HOME:-/}" "$TMPDIR" "${XDG_RUNTIME_DIR:-/}"; do
    if touch "$folder/tprt-probe" 2>/dev/null; then echo "$folder is writable" >&2; exit 90; fi
done
[ "$(df --output=size /dev/shm | tail -n 1)" -eq 1024 ]
"$@"
[ -z "$(ls -A /dev/shm)" ]
"""
NO_EXEC = """
mount -t tmpfs -o noexec tmpfs "$TMPDIR"
cp /bin/true "$TMPDIR/true"
if "$TMPDIR/true" 2>/dev/null; then echo "$TMPDIR is executable" >&2; exit 90; fi
rm "$TMPDIR/true"
"$@"
"""


@pytest.fixture(scope="module")
def private_mounts() -> list[str]:
    """The command that runs another one with mounts of its own."""
    tried = []
    for command in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        try:
            ran = subprocess.run(
                [*command, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            pytest.skip(f"needs util-linux's unshare: {error}")
        if ran.returncode == 0:
            return command
        tried.append(f"{' '.join(command)}: {ran.stderr.strip()}")
    pytest.skip(f"needs the right to mount in a namespace of its own ({'; '.join(tried)})")


@pytest.mark.usefixtures("tmpdir_of_children")
@pytest.mark.parametrize(
    "mounts",
    [
        pytest.param(READ_ONLY, id="with_1_mib_of_dev_shm_and_all_else_read_only"),
        pytest.param(NO_EXEC, id="where_no_temporary_file_may_be_executed"),
    ],
)
def test_a_deployment_works(private_mounts: list[str], tiny: TinyDeployment, mounts: str) -> None:
    command = tiny.command([[5, 6, 7]], NUM_TOKENS)
    process = start([*private_mounts, "sh", "-euc", mounts, "sh", *command])
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert json.loads(output)["token_ids"] == tiny.expected([5, 6, 7], NUM_TOKENS)
