"""The codec: what is encoded comes back the same, and anything else is refused with what was found."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tprt.errors import InvalidRequestError, TransportError
from tprt.messages import (
    AbortRequest,
    AddRequest,
    Float32Array,
    Grammar,
    Hello,
    Int32Array,
    Int64Array,
    Message,
    RequestFailed,
    SamplingParams,
    Shutdown,
    StepInput,
    StepOutput,
    UInt8Array,
    WorkerFailed,
)
from tprt.transport.codec import MAX_TEXT_CHARS, decode, encode
from tprt.transport.field_plan import FieldPlan

TYPES = typing.get_args(Message)
COLUMNS = ((Int32Array, np.int32), (Int64Array, np.int64), (Float32Array, np.float32), (UInt8Array, np.uint8))
INT64 = st.integers(-(2**63), 2**63 - 1)
BIASES = st.lists(st.tuples(INT64, st.floats(-100, 100) | st.integers(-100, 100)), max_size=3)
GRAMMARS = st.builds(Grammar, st.sampled_from(["json_schema", "regex", "lark"]), st.text(max_size=50))
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 9999),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 2**63 - 1),
    ignore_eos=st.booleans(),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    stop_token_ids=st.lists(INT64, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    logit_bias=BIASES.map(tuple),
    min_tokens=st.sampled_from([0, 1]),
    grammar=st.none() | GRAMMARS,
)
# The scalars of sampling parameters as they are on the wire.
PLAIN = (1.0, 0, 1.0, 0.0, None, 1, False, (), (), None, None, 0.0, 0.0, 1.0, (), 0, None)
# Lone surrogates stand for the bytes of a file name that are not UTF-8.
TEXT = st.text(st.characters(codec=None), max_size=50)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return values for a field of that annotation."""
    for annotation, dtype in COLUMNS:
        if hint == annotation:
            return npst.arrays(dtype, st.integers(0, 70))
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(typing.get_args(hint)[0]), max_size=3).map(tuple)
    return {
        int: INT64,
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        str: TEXT,
        SamplingParams: SAMPLING,
    }[hint]


def messages_of(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)})


def join(message: Message) -> bytes:
    return b"".join(encode(message))


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for field in dataclasses.fields(expected):
        got, wanted = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray):
            assert got.dtype == wanted.dtype
            assert got.tobytes() == wanted.tobytes()
            assert not got.flags.writeable
            assert got.flags.aligned
        else:
            assert type(got) is type(wanted)
            assert got == wanted


def make_step(num_seqs: int = 3) -> StepInput:
    int32, float32 = np.arange(num_seqs, dtype=np.int32), np.ones(num_seqs, np.float32)
    return StepInput(
        *(
            4,
            7,
            num_seqs,
            int32,
            int32,
            int32,
            int32,
            np.arange(5, dtype=np.int32),
            np.ones(num_seqs, np.uint8),
        ),
        *(float32, int32, float32, float32, np.arange(num_seqs, dtype=np.int64), int32),
    )


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_type_of_message_comes_back_the_same(kind: type) -> None:
    seen = []

    @settings(max_examples=60, deadline=None)
    @given(messages_of(kind))
    def check(message: Message) -> None:
        seen.append(message)
        data = join(message)
        assert len(data) % 8 == 0
        assert_equal(decode(data), message)
        assert_equal(decode(memoryview(bytearray(data))), message)

    check()
    assert seen


def test_every_field_of_every_message_has_a_rule() -> None:
    assert isinstance(Message, types.UnionType)
    for kind in TYPES:
        plan = FieldPlan(kind)
        assert sorted(plan.column_names + plan.scalar_names) == sorted(
            field.name for field in dataclasses.fields(kind)
        )


def test_columns_are_not_copied_by_encode_nor_by_decode() -> None:
    step = make_step()
    parts = encode(step)
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), step.block_ids) for part in parts[1:])
    data = b"".join(parts)
    decoded = decode(data)
    assert isinstance(decoded, StepInput)
    assert np.shares_memory(np.frombuffer(data, np.uint8), decoded.block_ids)


def test_a_column_that_is_a_strided_view_is_sent_as_what_it_shows() -> None:
    message = StepOutput(0, 1, np.arange(20, dtype=np.int32)[::3])
    decoded = decode(join(message))
    assert isinstance(decoded, StepOutput)
    assert decoded.token_ids.tolist() == list(range(0, 20, 3))


@pytest.mark.parametrize(
    "column", [np.zeros(3, np.int64), np.zeros((2, 2), np.int32), np.array([1.0], np.float32)], ids=str
)
def test_a_column_of_another_type_or_shape_is_refused_by_name(column: Any) -> None:
    with pytest.raises(TransportError, match=r"StepOutput.token_ids is .*; expected int32"):
        encode(StepOutput(0, 1, column))


@pytest.mark.parametrize("value", [np.int64(3), 2**70, object()], ids=["numpy", "huge", "object"])
def test_a_scalar_that_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(TransportError, match="AbortRequest has a field that cannot be sent"):
        encode(AbortRequest(value))


def test_a_long_text_keeps_both_of_its_ends() -> None:
    text = "begin" + "x" * 3 * MAX_TEXT_CHARS + "end"
    failed = decode(join(WorkerFailed(0, 1, "decode", "error", text)))
    assert isinstance(failed, WorkerFailed)
    assert len(failed.traceback) < MAX_TEXT_CHARS + 100
    assert failed.traceback.startswith("beginx")
    assert failed.traceback.endswith("xend")
    assert f"{len(text) - MAX_TEXT_CHARS} characters left out" in failed.traceback


def test_every_truncation_is_refused() -> None:
    for message in (make_step(), AddRequest(1, np.arange(3, dtype=np.int32), SamplingParams()), Hello()):
        data = join(message)
        for length in range(len(data)):
            with pytest.raises(TransportError):
                decode(data[:length])
        with pytest.raises(TransportError, match="whose header and columns have"):
            decode(data + b"\0" * 8)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_byte_gives_a_message_or_an_error_of_ours(data: st.DataObject) -> None:
    sent = bytearray(
        join(make_step(2)) if data.draw(st.booleans()) else join(RequestFailed(5, "no such model"))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, min(len(sent), 120) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TransportError, InvalidRequestError):
        assert type(decode(bytes(sent))) in TYPES


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(TransportError):
        decode(noise)


def forge(*header: Any, body: bytes = b"", version: int = 1, magic: bytes = b"TPRT") -> bytes:
    """Return a message with a header of one's own choice."""
    packed = msgpack.packb(header)
    sizes = len(packed).to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return magic + version.to_bytes(4, "little") + sizes + packed + b"\0" * (-len(packed) % 8) + body


def forge_request(*scalars: Any, length: int = 0, body: bytes = b"") -> bytes:
    """Return a request whose last sampling parameters are `scalars`."""
    sampling = [*PLAIN[: len(PLAIN) - len(scalars)], *scalars]
    return forge("AddRequest", "i4,i4", [1, sampling], [length, 0], body=body)


def test_a_forged_message_that_is_right_is_taken() -> None:
    assert decode(forge("Shutdown", "", ["why"], [])) == Shutdown("why")
    request = decode(forge_request([[3, 1.5], [4, -2]], 0, ["regex", "a+"]))
    assert isinstance(request, AddRequest)
    assert request.sampling.logit_bias == ((3, 1.5), (4, -2))
    assert request.sampling.grammar == Grammar("regex", "a+")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "begins with b'GET '; expected b'TPRT'"),
        (forge("Hello", "", [], [], version=2), "format version 2; expected 1: install the same version"),
        (forge("Hello", "", [], [], magic=b"TRPT"), "begins with b'TRPT'"),
        (forge("Goodbye", "", [], []), "of type 'Goodbye'; expected one of Hello, AddRequest"),
        (forge(3, "", [], []), "of type 3; expected one of"),
        (forge("Hello", ""), "the header ('Hello', ''); expected an array of 4"),
        (forge("Hello", "i4", [], [1], body=bytes(8)), "Hello with columns of dtypes 'i4'; expected ''"),
        (forge("Hello", "", [1], []), "Hello has 1 scalar fields; expected 0"),
        (forge("Hello", "", "x", []), "Hello has str for its scalar fields; expected 0"),
        (forge("Shutdown", "", [5], []), "Shutdown.reason is 5; expected str"),
        (forge("AbortRequest", "", [True], []), "AbortRequest.request_id is True; expected int"),
        (forge("AbortRequest", "", [2**63], []), "AbortRequest.request_id is 9223372036854775808"),
        (forge("AddRequest", "i4,i4", [1, {}], [0, 0]), "AddRequest.sampling is {}; expected SamplingParams"),
        (
            forge("AddRequest", "i4,i4", [1, [1.0]], [0, 0]),
            "SamplingParams has 1 scalar fields; expected 17: temperature, ",
        ),
        (forge("AddRequest", "i4,i4", [1, [1.0] * 17], [0, 0]), "SamplingParams.top_k is 1.0; expected int"),
        (forge_request([3], 0, None), "SamplingParams.logit_bias is (3,); expected"),
        (forge_request([[3]], 0, None), "SamplingParams.logit_bias is ((3,),); expected"),
        (forge_request([[3, 1.0, 2.0]], 0, None), "SamplingParams.logit_bias is ((3, 1.0, 2.0),); expected"),
        (forge_request([["a", 1.0]], 0, None), "SamplingParams.logit_bias is (('a', 1.0),); expected"),
        (forge_request([], 0, "a+"), "SamplingParams.grammar is 'a+'; expected"),
        (forge_request([], 0, ["a+"]), "SamplingParams.grammar is ('a+',); expected"),
        (forge_request([], 0, ["regex", 1]), "SamplingParams.grammar is ('regex', 1); expected"),
        (forge("AddRequest", "i4,i4", [1, []], [-1, 0]), "column lengths (-1, 0); expected 2 counts"),
        (forge("AddRequest", "i4,i4", [1, []], [1]), "column lengths (1,); expected 2 counts"),
        (
            forge_request(length=2**40),
            "AddRequest.prompt_token_ids with 1099511627776 elements runs past the end",
        ),
        (
            forge_request(length=2, body=bytes(16)),
            "AddRequest has 16 bytes of columns; its lengths add up to 8",
        ),
    ],
)
def test_what_is_wrong_with_a_message_is_said(data: bytes, said: str) -> None:
    with pytest.raises(TransportError) as caught:
        decode(data)
    assert said in str(caught.value)


def test_sampling_parameters_out_of_range_are_an_error_of_that_request() -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        decode(forge("AddRequest", "i4,i4", [1, [-1.0, *PLAIN[1:]]], [0, 0]))
    with pytest.raises(
        InvalidRequestError, match="a grammar of kind 'ebnf'; expected json_schema, regex or lark"
    ):
        decode(forge_request([], 0, ["ebnf", "a+"]))
    with pytest.raises(InvalidRequestError, match="biases from -100 to 100"):
        decode(forge_request([[3, 101.0]], 0, None))


def test_columns_that_are_empty_share_no_memory_with_the_message() -> None:
    decoded = decode(join(make_step()))
    assert isinstance(decoded, StepInput)
    assert not decoded.adjusts_logits
    assert decoded.token_masks.dtype == np.int32
    assert len(decoded.token_masks) == 0
