"""A rank finds the logits to adjust in its own part of the vocabulary, whichever sequences are sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.adjusted_steps import SequenceWishes, make_adjusted_step
from tprt.messages import StepInput
from tprt.sharding import Range
from tprt.worker.adjustment_input import adjustment_bytes, make_adjustments
from tprt.worker.input_batch import InputBuilder

VOCAB = 64


def places(step: StepInput, vocab_rows: Range) -> list[tuple[int, int]]:
    """Return (row, token) of every logit that gets a bias."""
    found = make_adjustments(step, np.flatnonzero(step.samples), vocab_rows, torch.from_numpy)
    assert found is not None
    rows, columns = np.divmod(found.bias_places.numpy(), vocab_rows.size)
    return list(zip(rows.tolist(), (columns + vocab_rows.start).tolist(), strict=True))


def test_sequences_that_are_not_sampled_have_no_row() -> None:
    wishes = [
        SequenceWishes(),
        SequenceWishes(bias={3: 1.0, 50: 1.0}),
        SequenceWishes(),
        SequenceWishes(bias={9: 1.0}),
    ]
    step = make_adjusted_step(wishes, VOCAB, samples=np.array([0, 1, 0, 1], np.uint8))
    assert places(step, Range(0, VOCAB)) == [(0, 3), (0, 50), (1, 9)]
    assert places(step, Range(0, 10)) == [(0, 3), (1, 9)]
    assert places(step, Range(40, VOCAB)) == [(0, 50)]


def test_a_grammar_restricts_the_row_of_its_sequence_among_those_that_are_sampled() -> None:
    wishes = [SequenceWishes(), SequenceWishes(allowed={20}), SequenceWishes(), SequenceWishes(allowed={21})]
    step = make_adjusted_step(wishes, VOCAB, samples=np.array([0, 1, 1, 1], np.uint8))
    for start, stop in ((0, VOCAB), (19, 23), (20, 21), (16, 24)):
        found = make_adjustments(step, np.array([1, 2, 3]), Range(start, stop), torch.from_numpy)
        assert found is not None
        logits = found.apply(torch.zeros(3, stop - start))
        assert logits.isfinite().sum(dim=1).tolist() == [1, stop - start, int(start <= 21 < stop)]
        assert logits[0, 20 - start] == 0


def test_every_rank_has_adjustments_when_any_has() -> None:
    step = make_adjusted_step([SequenceWishes(bias={3: 1.0})], VOCAB)
    found = make_adjustments(step, np.array([0]), Range(30, VOCAB), torch.from_numpy)
    assert found is not None
    assert len(found.bias_places) == 0
    logits = torch.randn(1, VOCAB - 30)
    assert found.apply(logits).equal(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adjustments_are_those_of_the_step_though_everything_else_is_as_before(temperature: float) -> None:
    builder = InputBuilder(4, 8, torch.device("cpu"), Range(0, VOCAB))
    found = []
    for bias in ({5: 1.0}, {6: 1.0}, {}):
        wishes = [SequenceWishes(bias=bias)]
        columns = {"temperatures": np.array([temperature], np.float32)}
        if not bias:
            columns |= {name: np.empty(0, np.int32) for name in ("bias_counts", "penalty_counts")}
        sampling = builder.build(make_adjusted_step(wishes, VOCAB, **columns)).sampling
        assert sampling is not None
        found.append(None if sampling.adjustments is None else sampling.adjustments.bias_places.tolist())
    assert found == [[5], [6], None]


def test_the_bytes_that_are_staged_were_announced() -> None:
    random = np.random.default_rng(0)
    wishes = [
        SequenceWishes(
            prompt=random.integers(0, VOCAB, 9).tolist(),
            bias=dict.fromkeys(random.integers(0, VOCAB, 5).tolist(), 1.0),
            repetition=2.0,
            allowed={1, 2},
        )
        for _ in range(7)
    ]
    step, staged = make_adjusted_step(wishes, VOCAB), []

    def stage(column: np.ndarray) -> torch.Tensor:
        staged.append(column.nbytes)
        return torch.from_numpy(column)

    make_adjustments(step, np.arange(7), Range(0, VOCAB), stage)
    assert sum(staged) == adjustment_bytes(step)
