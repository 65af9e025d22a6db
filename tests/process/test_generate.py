"""The command line and the Python class, on the real model and real processes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import LLM, SamplingParams
from launch.bench.compare_hf import time_run
from tests.support.checkpoints import TinyModel, reference_logits, reference_tokens, save_tiny
from tests.support.deployments import TinyDeployment
from tprt.errors import EngineDeadError, InvalidRequestError

CONFIG = "configs/smollm2-135m-tp2-cpu.yaml"
MODEL = ".models/SmolLM2-135M-Instruct"
NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)
QUESTIONS = ["Name three primary colors.", "Write one sentence about the sea."]


def tprt(*arguments: str, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [str(Path(sys.executable).parent / "tprt"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmpdir_of_children: Path) -> Path:
    """Every test starts and ends without children, files and shared memory."""
    return tmpdir_of_children


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What transformers generates, greedily and in float32."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    answers = {}
    for text in QUESTIONS:
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        result = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS)
        answers[text] = result[0, len(prompt) :].tolist()
    return answers


# Two ranks are the deployment below; three, those of the checkpoint without a tokenizer.
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_command_prints_one_json_line_per_prompt_with_the_tokens_of_transformers(
    expected: dict[str, list[int]], world_size: int
) -> None:
    prompts = [part for text in expected for part in ("--prompt", text)]
    ran = tprt(
        *(
            "generate",
            CONFIG,
            "--chat",
            *prompts,
            "--max-tokens",
            str(NUM_TOKENS),
            "--temperature",
            "0",
            "--json",
        ),
        *("--set", f"parallel.tensor_parallel_size={world_size}"),
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["token_ids"] for line in lines] == list(expected.values())
    decode = FastTokenizer.from_file(f"{MODEL}/tokenizer.json").decode
    for line in lines:
        assert line["text"] == decode(line["token_ids"])
        assert line["finish_reason"] == ("stop" if line["token_ids"][-1] == 2 else "length")
        assert line["prompt_tokens"] > 30
        assert "logprobs" not in line


def test_standard_streams_may_be_closed(tiny: TinyDeployment) -> None:
    command = shlex.join(tiny.command([[1, 2]], 2))
    assert subprocess.run(["sh", "-c", f"{command} 2>&- <&-"], capture_output=True, timeout=100).returncode == 0
    ran = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, timeout=100, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(CONFIG) as llm:
        yield llm


class TestOneDeployment:
    """What a running engine does, request by request."""

    @pytest.fixture(autouse=True)
    def nothing_is_left_behind(self) -> None:
        """The deployment stays up between these tests."""

    def test_chat_answers_in_english_with_the_tokens_of_transformers(
        self, llm: LLM, expected: dict[str, list[int]]
    ) -> None:
        outputs = [llm.chat([{"role": "user", "content": text}], GREEDY)[0].outputs[0] for text in QUESTIONS]
        assert outputs[0].text == "The primary colors are: Red, Blue, and Yellow."
        assert outputs[0].finish_reason == "stop"
        assert [output.token_ids for output in outputs] == [expected[text] for text in QUESTIONS]

    def test_a_prompt_that_is_refused_is_no_measurement(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match="prompt 2: "):
            time_run(llm, [[1], [1] * 3000], new_tokens=2)

    def test_outputs_come_in_the_order_of_the_prompts(self, llm: LLM) -> None:
        prompts = [f"The number {n} is" for n in range(20)]
        few = SamplingParams(temperature=0.0, max_tokens=4)
        outputs = llm.generate(prompts, few)
        assert [output.prompt for output in outputs] == prompts
        assert outputs[7].outputs[0].token_ids == llm.generate(prompts[7], few)[0].outputs[0].token_ids

    def test_one_seed_gives_one_text_alone_and_in_a_batch(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=8)
        alone = llm.generate("Once upon a time", params)[0].outputs[0].token_ids
        batch = llm.generate(["Once upon a time", "In the end", "We"], params)
        other = llm.generate("Once upon a time", SamplingParams(temperature=0.9, seed=12, max_tokens=8))
        assert batch[0].outputs[0].token_ids == alone
        assert other[0].outputs[0].token_ids != alone

    def test_a_stop_string_ends_the_text_before_it(self, llm: LLM) -> None:
        chat = [{"role": "user", "content": "Name three primary colors."}]
        output = llm.chat(chat, SamplingParams(temperature=0.0, max_tokens=24, stop=("Blue",)))[0].outputs[0]
        assert output.text == "The primary colors are: Red, "
        assert output.finish_reason == "stop"

    def test_eos_ends_a_text_unless_it_is_ignored(self, llm: LLM) -> None:
        ids = llm.encode_chat([{"role": "user", "content": "Name three primary colors."}])
        stopped = llm.generate(ids, GREEDY)[0].outputs[0]
        endless = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        ignored = llm.generate(ids, endless)[0].outputs[0]
        assert len(stopped.token_ids) < len(ignored.token_ids) == NUM_TOKENS
        assert ignored.token_ids[: len(stopped.token_ids)] == stopped.token_ids

    def test_logprobs_are_those_of_the_model(self, llm: LLM) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=2)
        output = llm.generate("The sky is blue because", sampling)[0]
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        reference = reference_logits(model, output.prompt_token_ids + output.outputs[0].token_ids)
        assert output.outputs[0].logprobs is not None
        assert output.prompt_logprobs is not None
        nothing, *prompt = output.prompt_logprobs
        assert nothing is None
        assert [found.token_id for found in prompt if found] == output.prompt_token_ids[1:]
        rows = reference.log_softmax(-1)[:-1]
        for row, found in zip(rows, [*prompt, *output.outputs[0].logprobs], strict=True):
            assert found is not None
            best = row.topk(2)
            assert [token for token, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)
            assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-3)

    def test_a_prompt_that_is_too_long_is_refused_and_the_engine_goes_on(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match="prompt 1: the prompt has 3000 tokens, and at most 2047"):
            llm.generate([5] * 3000, GREEDY)
        assert llm.generate("The sky is", ONE_TOKEN)[0].outputs[0].text

    def test_a_prompt_that_cannot_even_be_sent_leaves_the_others_alone(self, llm: LLM) -> None:
        first, refused, last = llm.run([[504], [-1], [505]], [ONE_TOKEN] * 3)
        assert (len(first.token_ids), len(last.token_ids)) == (1, 1)
        assert "must be whole numbers from 0" in (refused.error or "")
        with pytest.raises(InvalidRequestError, match="prompt 2: prompt token ids must be whole"):
            llm.generate([[504], [-1]], ONE_TOKEN)

    def test_a_second_prompt_with_the_same_beginning_takes_it_from_the_cache(self, llm: LLM) -> None:
        prompt = list(range(100, 164))
        llm.generate(prompt, ONE_TOKEN)
        assert llm.generate([*prompt, 7], ONE_TOKEN)[0].num_cached_tokens == 64


def test_a_checkpoint_without_a_tokenizer_takes_prompts_as_token_ids(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, TinyModel(heads=9, kv_heads=3))
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {tmp_path}, dtype: float32}}\nparallel: {{tensor_parallel_size: 3}}\n"
        "runtime: {device: cpu}\nlogging: {level: error}\ncache: {num_blocks: 64}\n"
    )
    ran = tprt(
        *("generate", str(tmp_path / "tiny.yaml"), "--prompt-ids", "5,6,7", "--prompt-ids", "9,8"),
        *("--prompt-ids", "500,1", "--max-tokens", "5", "--ignore-eos", "--json"),
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line.get("token_ids") for line in lines[:2]] == [
        reference_tokens(model, [5, 6, 7], 5),
        reference_tokens(model, [9, 8], 5),
    ]
    assert "outside the vocabulary of 199" in lines[2]["error"]
    assert ran.returncode == 2
    assert "prompt 3: prompt token 0 has id 500" in ran.stderr


@pytest.mark.parametrize("victim", ["rank 1", "coordinator"])
def test_a_process_that_is_killed_and_not_replaced_ends_all_and_is_named(
    tiny: TinyDeployment, victim: str
) -> None:
    with LLM(tiny.config, ["supervision.max_restarts=0"]) as llm:
        pids = llm.pids
        os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=rf"{victim} \(pid {pids[victim]}\) was killed by SIGKILL"):
            llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=60_000, ignore_eos=True))
    for pid in pids.values():
        assert not Path(f"/proc/{pid}").exists()


def test_the_death_of_the_parent_takes_all_children_with_it(
    tiny: TinyDeployment, nothing_is_left_behind: Path
) -> None:
    program = (
        "import time\nfrom launch import LLM\n"
        f"llm = LLM({tiny.config!r})\nprint(*llm.pids.values(), flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = parent.stdout.readline().split()
    parent.kill()
    parent.wait(5)
    parent.stdout.close()
    deadline_s = time.monotonic() + 3
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    # Nobody was left to remove the run directory; the next start does, or whoever finds it.
    for run_dir in nothing_is_left_behind.glob("tprt-*"):
        shutil.rmtree(run_dir)
