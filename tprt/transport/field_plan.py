"""What the codec must know of a message type, worked out once from its annotations.

Knows nothing of the wire format beyond which Python values it can hold.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from tprt.errors import TransportError
from tprt.messages import Float32Array, Grammar, Int32Array, Int64Array, SamplingParams, UInt8Array

Check = Callable[[object], bool]
Getter = Callable[[object], tuple[Any, ...]]

_COLUMNS = ((Int32Array, "<i4"), (Int64Array, "<i8"), (Float32Array, "<f4"), (UInt8Array, "u1"))


class FieldPlan:
    """Columns and scalars of one message type.

    Attributes:
        kind: the type.
        name: its name, which is also its tag on the wire.
        signature: the dtypes of its columns in one string, such as `i4,f4`.
        column_names, dtypes: its array fields, in order; little-endian.
        empty_columns: each of them without an element, not to be written to.
        scalar_names: the other fields, in order.
        sampling_name: the scalar that is a `SamplingParams`, or None.
        columns_of, scalars_of: read those fields of a message.
    """

    def __init__(self, kind: type[Any]) -> None:
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        dtypes = {name: dtype for name in names if (dtype := _dtype_of(hints[name])) is not None}
        self.kind = kind
        self.name = kind.__name__
        self.column_names = tuple(dtypes)
        self.dtypes = tuple(dtypes.values())
        self.empty_columns = {name: np.frombuffer(b"", dtype) for name, dtype in dtypes.items()}
        self.signature = ",".join(dtype.str[1:] for dtype in self.dtypes)
        self.scalar_names = tuple(name for name in names if name not in dtypes)
        self.sampling_name = next((name for name in names if hints[name] is SamplingParams), None)
        self.columns_of = _getter(self.column_names)
        self.scalars_of = _getter(self.scalar_names)
        self._checks = tuple(_check_of(hints[name]) for name in self.scalar_names)
        self._expected = tuple(str(getattr(hints[name], "__name__", hints[name])) for name in self.scalar_names)

    def check_scalars(self, values: object) -> dict[str, object]:
        """Return the scalars by name.

        Raises:
            TransportError: their number or the type of one of them is wrong.
        """
        if type(values) is not tuple or len(values) != len(self.scalar_names):
            found = (
                f"{len(values)} scalar fields"
                if type(values) is tuple
                else f"{type(values).__name__} for its scalar fields"
            )
            expected = f"{len(self.scalar_names)}: {', '.join(self.scalar_names)}"
            raise TransportError(f"{self.name} has {found}; expected {expected}")
        for index, (check, value) in enumerate(zip(self._checks, values, strict=True)):
            if not check(value):
                raise TransportError(
                    f"{self.name}.{self.scalar_names[index]} is {repr(value)[:80]};"
                    f" expected {self._expected[index]}"
                )
        return dict(zip(self.scalar_names, values, strict=True))


def _getter(names: Sequence[str]) -> Getter:
    """Return a function that reads the fields `names` of an object, always as a tuple."""
    if not names:
        return lambda _: ()
    if len(names) == 1:
        read_one = attrgetter(names[0])
        return lambda message: (read_one(message),)
    return attrgetter(*names)


def _dtype_of(hint: object) -> np.dtype[Any] | None:
    """Return the little-endian dtype of a column's annotation, None for anything else.

    The annotations are compared, not taken apart: what is inside an `NDArray` differs between numpy versions.
    """
    return next((np.dtype(dtype) for annotation, dtype in _COLUMNS if hint == annotation), None)


def _check_of(hint: object) -> Check:
    """Return what tells whether a value from the wire fits the annotation of a scalar field."""
    if hint in _CHECKS:
        return _CHECKS[hint]
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        if rest != [Ellipsis]:
            return _record_check([_check_of(first), *map(_check_of, rest)])
        return _tuple_check(_check_of(first))
    if get_origin(hint) in (Union, types.UnionType):
        return _optional_check(_check_of(get_args(hint)[0]))
    raise TypeError(f"the codec has no rule for a field of type {hint}")


def _is_int64(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


_CHECKS: dict[object, Check] = {
    int: _is_int64,
    float: lambda value: type(value) is float or _is_int64(value),
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    # nested records; the plan of the one looks into it, the other is small
    SamplingParams: lambda value: type(value) is tuple,
    Grammar: lambda value: type(value) is tuple and len(value) == 2 and all(type(v) is str for v in value),
}


def _tuple_check(check: Check) -> Check:
    return lambda value: type(value) is tuple and all(map(check, value))


def _record_check(checks: Sequence[Check]) -> Check:
    return lambda value: (
        type(value) is tuple
        and len(value) == len(checks)
        and all(check(part) for check, part in zip(checks, value, strict=True))
    )


def _optional_check(check: Check) -> Check:
    return lambda value: value is None or check(value)
