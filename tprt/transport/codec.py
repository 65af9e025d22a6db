"""Messages to bytes and back: a msgpack header, then every array as it lies in memory. No pickle.

    preamble   16 bytes: magic, format version, bytes of the header, bytes of the columns
    header     msgpack [name of the type, dtypes of columns, scalars, lengths of columns], padded to 8 bytes
    columns    raw little-endian elements, each column padded to 8 bytes

What goes in and what comes out is checked against the types of `tprt.messages`, so that data from elsewhere
gives an error here and not an odd one later. Knows nothing of how the bytes are carried.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn, get_args

import msgpack
import numpy as np

from tprt.errors import TransportError
from tprt.messages import NO_FLOAT32, NO_INT32, Grammar, Message, SamplingParams
from tprt.transport.channel import Buffer
from tprt.transport.field_plan import FieldPlan

FORMAT_VERSION = 1
MAX_TEXT_CHARS = 200_000

_MAGIC = b"TPRT"
_PREAMBLE = struct.Struct("<4sIII")
_ALIGNMENT = 8
_PADDING = [b"\0" * n for n in range(_ALIGNMENT)]
_PLAN_OF_TYPE = {kind: FieldPlan(kind) for kind in get_args(Message)}
_PLAN_OF_TAG = {plan.name: plan for plan in _PLAN_OF_TYPE.values()}
_SAMPLING = FieldPlan(SamplingParams)
# Lone surrogates (undecodable file names in a traceback) must not keep an error report from being sent.
_UNICODE_ERRORS = "surrogatepass"


def encode(message: Message) -> list[Buffer]:
    """Return the parts whose concatenation is `message`; columns are not copied.

    A text field of more than `MAX_TEXT_CHARS` (a traceback) is shortened in its middle.

    Raises:
        TransportError: a field is not of its declared type; the message names it.
    """
    plan = _PLAN_OF_TYPE[type(message)]
    columns = plan.columns_of(message)
    parts: list[Buffer] = [b""]
    lengths = []
    body_bytes = 0
    for name, dtype, column in zip(plan.column_names, plan.dtypes, columns, strict=True):
        if column is NO_INT32 or column is NO_FLOAT32:
            # A third of the columns of most steps: what a message has where it says nothing.
            lengths.append(0)
            continue
        if column.dtype != dtype or column.ndim != 1:
            _raise_wrong_column(plan, name, dtype, column)
        lengths.append(length := len(column))
        if length:
            num_bytes = column.nbytes
            parts.append(np.ascontiguousarray(column).view(np.uint8).data)
            if padding := -num_bytes % _ALIGNMENT:
                parts.append(_PADDING[padding])
            body_bytes += num_bytes + padding
    scalars = [
        _shorten(value) if type(value) is str and len(value) > MAX_TEXT_CHARS else value
        for value in plan.scalars_of(message)
    ]
    header = _pack(plan, [plan.name, plan.signature, scalars, lengths])
    padded = header + _PADDING[-len(header) % _ALIGNMENT]
    parts[0] = _PREAMBLE.pack(_MAGIC, FORMAT_VERSION, len(header), body_bytes) + padded
    return parts


def decode(data: bytes | memoryview) -> Message:
    """Return the message in `data`; its arrays are read-only views of `data`.

    Raises:
        TransportError: `data` is not such a message, whole and of this version.
        InvalidRequestError: the sampling parameters in it are out of range.
    """
    if type(data) is not bytes:
        data = memoryview(data).toreadonly()
    header_bytes, body_bytes = _read_preamble(data)
    header_end = _PREAMBLE.size + header_bytes
    plan, scalars, lengths = _read_header(data[_PREAMBLE.size : header_end])
    fields = plan.check_scalars(scalars)
    if plan.sampling_name is not None:
        fields[plan.sampling_name] = _to_sampling(fields[plan.sampling_name])
    fields.update(plan.empty_columns)
    start = body = header_end + -header_bytes % _ALIGNMENT
    for name, dtype, length in zip(plan.column_names, plan.dtypes, lengths, strict=True):
        if length == 0:
            continue
        num_bytes = length * dtype.itemsize
        if start + num_bytes > body + body_bytes:
            raise TransportError(f"{plan.name}.{name} with {length} elements runs past the end of the message")
        fields[name] = np.frombuffer(data, dtype, length, start)
        start += num_bytes + -num_bytes % _ALIGNMENT
    if start != body + body_bytes:
        raise TransportError(
            f"{plan.name} has {body_bytes} bytes of columns; its lengths add up to {start - body}"
        )
    return plan.kind(**fields)  # type: ignore[no-any-return]


def _read_preamble(data: bytes | memoryview) -> tuple[int, int]:
    """Return the bytes of the header, unpadded, and of the columns; `data` has exactly what they add up to."""
    if len(data) < _PREAMBLE.size:
        raise TransportError(f"a message of {len(data)} bytes; expected {_PREAMBLE.size} or more")
    magic, version, header_bytes, body_bytes = _PREAMBLE.unpack_from(data)
    if magic != _MAGIC:
        raise TransportError(f"a message that begins with {magic!r}; expected {_MAGIC!r}: it is not from tprt")
    if version != FORMAT_VERSION:
        raise TransportError(
            f"a message of format version {version}; expected {FORMAT_VERSION}:"
            " install the same version of tprt at both ends"
        )
    expected = _PREAMBLE.size + header_bytes + -header_bytes % _ALIGNMENT + body_bytes
    if len(data) != expected:
        raise TransportError(f"a message of {len(data)} bytes whose header and columns have {expected}")
    return header_bytes, body_bytes


def _read_header(header: bytes | memoryview) -> tuple[FieldPlan, object, tuple[int, ...]]:
    try:
        content = msgpack.unpackb(header, use_list=False, unicode_errors=_UNICODE_ERRORS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TransportError(
            f"a message whose header is not msgpack: {type(error).__name__}: {error}"
        ) from error
    if type(content) is not tuple or len(content) != 4:
        raise TransportError(f"a message with the header {_excerpt(content)}; expected an array of 4")
    tag, signature, scalars, lengths = content
    plan = _PLAN_OF_TAG.get(tag) if type(tag) is str else None
    if plan is None:
        raise TransportError(f"a message of type {_excerpt(tag)}; expected one of {', '.join(_PLAN_OF_TAG)}")
    if signature != plan.signature:
        raise TransportError(
            f"{plan.name} with columns of dtypes {_excerpt(signature)}; expected {plan.signature!r}"
        )
    if (
        type(lengths) is not tuple
        or len(lengths) != len(plan.dtypes)
        # Most columns of most messages are empty.
        or not all(type(length) is int and length > 0 for length in lengths if length != 0)
    ):
        raise TransportError(
            f"{plan.name} with column lengths {_excerpt(lengths)}; expected {len(plan.dtypes)} counts"
        )
    return plan, scalars, lengths


def _pack(plan: FieldPlan, header: list[object]) -> bytes:
    try:
        packed: bytes = msgpack.packb(header, default=_pack_nested, unicode_errors=_UNICODE_ERRORS)
    except (TypeError, OverflowError) as error:
        raise TransportError(f"{plan.name} has a field that cannot be sent: {error}") from error
    return packed


def _to_sampling(scalars: object) -> SamplingParams:
    fields = _SAMPLING.check_scalars(scalars)
    if fields["grammar"] is not None:
        fields["grammar"] = Grammar(*fields["grammar"])  # type: ignore[misc]
    return SamplingParams(**fields)  # type: ignore[arg-type]


def _pack_nested(value: object) -> object:
    if type(value) is SamplingParams:
        return _SAMPLING.scalars_of(value)
    if type(value) is Grammar:
        return value.kind, value.source
    raise TypeError(f"{value!r} is {type(value).__name__}; expected a plain Python value")


def _shorten(text: str) -> str:
    """Keep the two ends of a text, where a traceback says who called and what went wrong."""
    half = MAX_TEXT_CHARS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _raise_wrong_column(
    plan: FieldPlan, name: str, dtype: np.dtype[Any], column: np.ndarray[Any, Any]
) -> NoReturn:
    raise TransportError(
        f"{plan.name}.{name} is {column.dtype} of shape {column.shape}; expected {dtype} of one dimension"
    )
