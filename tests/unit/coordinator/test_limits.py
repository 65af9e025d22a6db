from __future__ import annotations

import numpy as np
import pytest

from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.errors import ConfigError, InvalidRequestError
from tprt.messages import AddRequest, SamplingParams

VOCAB_SIZE = 100


def scheduler(max_model_len: int = 32, num_blocks: int = 100) -> Scheduler:
    return Scheduler(SchedulerLimits(4, 16, max_model_len, 4, num_blocks, True), (2,), VOCAB_SIZE)


def request(prompt: list[int], **sampling: object) -> AddRequest:
    return AddRequest(1, np.array(prompt, np.int32), SamplingParams(**sampling))  # type: ignore[arg-type]


def refusal(target: Scheduler, bad: AddRequest, key: object = "k") -> str:
    with pytest.raises(InvalidRequestError) as caught:
        target.add(key, bad)  # type: ignore[arg-type]
    return str(caught.value)


def test_an_empty_prompt_is_refused() -> None:
    assert "empty" in refusal(scheduler(), request([]))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_token_outside_the_vocabulary_is_refused_by_place_and_id(token_id: int) -> None:
    message = refusal(scheduler(), request([1, 2, token_id, 3]))
    assert "token 2 " in message
    assert f"id {token_id}" in message
    assert str(VOCAB_SIZE) in message


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_both_numbers_and_the_setting() -> None:
    message = refusal(scheduler(max_model_len=32), request([1] * 32))
    assert "32 tokens" in message
    assert "31" in message
    assert "model.max_model_len" in message


def test_a_prompt_of_max_model_len_less_one_is_served() -> None:
    target = scheduler(max_model_len=32)
    target.add("k", request([1] * 31))
    assert target.num_waiting == 1


def test_a_prompt_that_all_blocks_together_cannot_hold_is_refused_with_the_setting() -> None:
    target = scheduler(max_model_len=1000, num_blocks=5)
    assert "cache.num_blocks" in refusal(target, request([1] * 21))
    target.add("k", request([1] * 20))


def test_stop_tokens_outside_the_vocabulary_and_too_many_of_them_are_refused() -> None:
    assert "stop_token_ids holds 100" in refusal(scheduler(), request([1], stop_token_ids=(3, 100)))
    assert "257 entries" in refusal(scheduler(), request([1], stop_token_ids=(3,) * 257))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_bias_of_a_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    bad = request([1], logit_bias=((3, 1.0), (token_id, 1.0)))
    assert refusal(scheduler(), bad).startswith(f"logit_bias names token {token_id}, ")


def test_a_key_in_use_is_refused_and_the_first_request_goes_on() -> None:
    target = scheduler()
    target.add("k", request([1, 2]))
    assert "has not ended" in refusal(target, request([3]))
    step = target.schedule()
    assert step is not None
    assert step.token_ids.tolist() == [1, 2]


def test_a_refused_request_leaves_nothing_behind() -> None:
    target = scheduler()
    refusal(target, request([]))
    assert not target.has_unfinished
    target.add("k", request([1]))
    target.check()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens 3"),
    ],
)
def test_limits_that_cannot_work_are_refused(change: dict[str, int], named: str) -> None:
    values = dict(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32, block_size=4, num_blocks=9)
    with pytest.raises(ConfigError, match=named):
        SchedulerLimits(**(values | change))
