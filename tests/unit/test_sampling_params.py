"""Sampling parameters: what is taken reaches the coordinator, and what is not is named at once."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tprt.errors import InvalidRequestError
from tprt.messages import AddRequest, Grammar, SamplingParams
from tprt.transport.codec import decode, encode

NAMES = [field.name for field in dataclasses.fields(SamplingParams)]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
SOME = SCALARS | st.floats().map(np.float64) | st.integers(0, 9).map(np.int64)
PAIRS = st.tuples(SOME, SOME)
VALUES = SOME | st.lists(SOME | PAIRS, max_size=2) | st.lists(SOME | PAIRS, max_size=2).map(tuple)


@given(name=st.sampled_from(NAMES), value=VALUES)
def test_whatever_a_field_is_it_is_refused_or_can_be_read_at_the_other_end(name: str, value: object) -> None:
    try:
        sampling = SamplingParams(**{name: value})  # type: ignore[arg-type]
    except InvalidRequestError:
        return
    message = decode(b"".join(encode(AddRequest(1, np.array([5], np.int32), sampling))))
    assert isinstance(message, AddRequest)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", 16.0, "a whole number"),
        ("max_tokens", True, "a whole number"),
        ("logprobs", True, "a whole number or None"),
        ("temperature", "0", "a number"),
        ("ignore_eos", 1, "True or False"),
        ("stop", "END", "strings in a tuple or list"),
        ("stop_token_ids", 2, "token ids in a tuple or list"),
        ("stop_token_ids", (2**63,), "token ids in a tuple or list"),
        ("logit_bias", {5: 1.0}, "pairs of a token id and a number"),
        ("grammar", "[a-z]+", "a Grammar or None"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_expected(
    name: str, value: object, expected: str
) -> None:
    text = re.escape(f"sampling parameter {name} is {value!r}; expected {expected}")
    with pytest.raises(InvalidRequestError, match=f"^{text}$"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_lists_and_numbers_of_numpy_that_are_floats_are_taken() -> None:
    sampling = SamplingParams(temperature=np.float64(0.5), stop=["a"], stop_token_ids=[2])  # type: ignore[arg-type]
    message = decode(b"".join(encode(AddRequest(1, np.array([5], np.int32), sampling))))
    assert isinstance(message, AddRequest)
    assert message.sampling == SamplingParams(temperature=0.5, stop=("a",), stop_token_ids=(2,))


def test_the_source_of_a_grammar_must_be_text() -> None:
    with pytest.raises(InvalidRequestError, match="whose source is dict; expected str"):
        Grammar("json_schema", {"type": "object"})  # type: ignore[arg-type]
