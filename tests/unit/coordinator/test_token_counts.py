"""Counts that are kept token by token are those of the whole history."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tprt.coordinator.token_counts import TokenCounts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("counts_prompt", [True, False])
def test_counts_are_those_of_the_whole_output(seed: int, counts_prompt: bool) -> None:
    random = np.random.default_rng(seed)
    prompt = random.integers(0, 40, 50).astype(np.int32)
    counts = TokenCounts(prompt if counts_prompt else None)
    expected = Counter(dict.fromkeys(prompt.tolist(), 0) if counts_prompt else {})
    for _ in range(60):
        tokens = random.integers(0, 300, int(random.integers(0, 4))).tolist()
        counts.take(tokens)
        expected.update(tokens)
        found = dict(zip(counts.token_ids.tolist(), counts.output_counts.tolist(), strict=True))
        assert found == dict(expected)
    assert len(expected) > 64


def test_each_token_is_there_once() -> None:
    counts = TokenCounts(np.array([7, 7, 3], np.int32))
    counts.take([3, 9, 9])
    assert sorted(counts.token_ids.tolist()) == [3, 7, 9]
