"""Runs chat templates, which come with checkpoints from anywhere, where they can do no harm.

Jinja's sandbox keeps them from Python's insides and from changing what they are given. On top of it come
bounds: on the rounds of all loops and on all calls together, on the length of what is written, and on every
value that an operator, a filter or a call makes. That ends what loops for ever, recurses or doubles a text
again and again. Not bounded is what a single call makes at once before it is looked at (`"x".center(n)`,
`x.replace("", x)`).

Knows nothing of messages and tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tprt.errors import InvalidRequestError

MAX_ROUNDS = 1_000_000
MAX_LENGTH = 16_000_000
_MAX_INTEGER_BITS = 4096
# Names that no template can write.
_BUDGET = "rounds left"
_IN_BUDGET = "in budget"
_SIZED = "sized"
# A width of five digits, or one that is computed.
_WIDE_FORMAT = re.compile(r"\*|\d{5}")

# What templates raise when their messages are not as they expect, or a bound is passed.
_REFUSALS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class SandboxedTemplate:
    """One chat template, compiled once; several threads may render it."""

    def __init__(self, source: str) -> None:
        """Compile `source`.

        Raises:
            InvalidRequestError: it is no template.
        """
        environment = _Environment()
        try:
            tree = environment.parse(source)
            _bound(tree)
            code = environment.compile(tree)
        except _REFUSALS as error:
            raise InvalidRequestError(f"the chat template of this checkpoint is broken: {error}") from error
        self._template = Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text that the template makes of `variables`.

        Raises:
            InvalidRequestError: the template refuses them (its own error is the cause), or has passed a bound.
        """
        written: list[str] = []
        length = 0
        try:
            for piece in self._template.generate({**variables, _BUDGET: _Budget()}):
                written.append(piece)
                length += len(piece)
                _check_length(length)
        except _REFUSALS as error:
            words = str(error) or type(error).__name__
            raise InvalidRequestError(f"the chat template refuses these messages: {words}") from error
        return "".join(written)


class _Budget:
    """The rounds of loops, and the calls, that one render has left."""

    def __init__(self) -> None:
        self._left = MAX_ROUNDS

    def spend(self) -> None:
        """Take one; raise `TemplateError` when none is left."""
        self._left -= 1
        if self._left < 0:
            raise TemplateError(f"it does not end: {MAX_ROUNDS} rounds of loops and calls have passed")


class _GenerationBlock(Extension):
    """`{% generation %}`: marks what the model writes, for training; here its content alone counts."""

    tags = {"generation"}  # noqa: RUF012  (as jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (Hugging Face, "Chat templates"), with bounds."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        self.filters["tojson"] = _to_json
        self.filters[_IN_BUDGET] = _in_budget
        self.filters[_SIZED] = _sized
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        # It writes as much as it is asked to.
        del self.globals["lipsum"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` unless the result would be too large."""
        if operator == "*":
            _check_length(_repeated_length(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise TemplateError(f"it formats with {left!r}; expected widths below 10000")
        return _sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call `__obj` if the sandbox allows it and there are calls left."""
        __context[_BUDGET].spend()
        if isinstance(__obj, LoopContext) and args:
            args = (_in_budget(__context, args[0]), *args[1:])
        return _sized(super().call(__context, __obj, *args, **kwargs))


def _bound(tree: nodes.Template) -> None:
    """Let every loop of `tree` count its rounds, and look at whatever a filter, a `~` or a block makes."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filtered(loop.iter, _IN_BUDGET)
    for block in list(tree.find_all(nodes.AssignBlock)):
        block.filter = nodes.Filter(block.filter, _SIZED, [], [], None, None, lineno=block.lineno)
    for owner in [tree, *tree.find_all(nodes.Node)]:
        for name, value in list(owner.iter_fields()):
            if isinstance(value, list):
                value[:] = [_looked_at(part) for part in value]
            else:
                setattr(owner, name, _looked_at(value))


def _looked_at(value: Any) -> Any:
    """Wrap a node that can make a long value; leave what the bounds themselves have put there."""
    if isinstance(value, nodes.Concat):
        return _filtered(value, _SIZED)
    if isinstance(value, nodes.Filter) and value.node is not None and value.name not in (_IN_BUDGET, _SIZED):
        return _filtered(value, _SIZED)
    return value


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _in_budget(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context[_BUDGET]
    for item in items:
        budget.spend()
        yield item


def _sized(value: Any) -> Any:
    """Return `value` unless it is too large; `TemplateError` if it is."""
    if isinstance(value, str | list | tuple | dict):
        _check_length(len(value))
    elif isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _repeated_length(left: Any, right: Any) -> int:
    """Return the length of `left * right`, 0 where it is a number."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int):
            return len(items) * times
    return 0


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateError(f"it makes a text or list of {length}; {MAX_LENGTH} at most")


def _check_bits(num_bits: int) -> None:
    if num_bits > _MAX_INTEGER_BITS:
        raise TemplateError(f"it computes a number of {num_bits} bits; {_MAX_INTEGER_BITS} at most")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump without escaping HTML, which jinja's own filter does."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
