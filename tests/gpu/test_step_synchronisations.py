"""A decode step costs one copy to the device, one back, and one wait: that for its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.messages import SamplingParams, StepInput
from tprt.worker.decode_graphs import is_decode
from tprt.worker.model_runner import ModelRunner

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + index] * (1 + 4 * index) for index in range(5)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
RANDOM = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
TRUNCATED = SamplingParams(temperature=0.8, seed=3, top_k=7, max_tokens=12, ignore_eos=True)
_MARK = "a step of the test"


def counts_of(runner: ModelRunner, steps: Sequence[StepInput]) -> tuple[list[int], int, int]:
    """Return the host's waits in each of `steps`, and the copies to the device and back in all of them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for step in steps:
            with record_function(_MARK):
                runner.launch(step).wait()
    events = profiled.events()
    spans = [event.time_range for event in events if event.name == _MARK and event.device_type.name == "CPU"]
    assert len(spans) == len(steps)
    waits = [event.time_range.start for event in events if event.name.endswith("Synchronize")]
    to_device, back = (sum(way in event.name for event in events) for way in ("Memcpy HtoD", "Memcpy DtoH"))
    return [sum(span.start <= at <= span.end for at in waits) for span in spans], to_device, back


@pytest.mark.parametrize(
    ("sampling", "copies"),
    # What truncation needs follows the captured part of the step, with a copy of its own.
    [(GREEDY, 1), (RANDOM, 1), (TRUNCATED, 2)],
    ids=["greedy", "random", "truncated"],
)
def test_a_captured_decode_waits_once_and_copies_its_columns_together(
    tmp_path: Path, sampling: SamplingParams, copies: int
) -> None:
    save_tiny(tmp_path, TinyModel(heads=6, kv_heads=3))
    with LocalEngine(make_config(tmp_path, device="cuda")) as engine:
        engine.generate(PROMPTS, sampling)
        decodes = [step for step in engine.steps if is_decode(step)][-6:]
        waits, to_device, back = counts_of(engine.runners[0], decodes)
    assert len(decodes) == 6
    assert waits == [1] * 6
    assert (to_device, back) == (6 * copies, 6)


def test_the_first_decode_after_prompts_of_many_blocks_waits_once_too(tmp_path: Path) -> None:
    save_tiny(tmp_path, TinyModel(heads=6, kv_heads=3))
    with LocalEngine(make_config(tmp_path, device="cuda", enable_prefix_caching=False)) as engine:
        engine.generate(PROMPTS, GREEDY)
        start = len(engine.steps)
        engine.generate(PROMPTS[::-1], GREEDY)
        decode = next(step for step in engine.steps[start:] if is_decode(step))
        # The tables that the device knows are made to differ from those of the step in every block.
        tables = engine.runners[0]._graphs._tables  # type: ignore[union-attr]
        tables._known.fill(-1)
        waits, to_device, back = counts_of(engine.runners[0], [decode])
    assert (waits, to_device, back) == ([1], 2, 1)
