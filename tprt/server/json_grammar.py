"""JSON schemas and other sources of grammars, within bounds of size and depth.

Knows nothing of where in a request they stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from tprt.messages import Grammar
from tprt.server.invalid_field import InvalidFieldError

MAX_SOURCE_CHARACTERS = 131_072
MAX_DEPTH = 64
# Between the parts of JSON: nothing, a space, or a new line with its indentation. A model that is not sure what
# to write would otherwise write white space for ever.
_SPACE = r" ?|\n[ \t]{0,64}"


def bounded_grammar(field: str, kind: Literal["json_schema", "regex", "lark"], source: str) -> Grammar:
    """Return a grammar.

    Raises:
        InvalidFieldError: it is too long.
    """
    check_length(field, source)
    return Grammar(kind, source)


def check_length(field: str, source: str) -> None:
    """Raise `InvalidFieldError` if `source` is too long."""
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise InvalidFieldError(field, f"{len(source)} characters; expected {MAX_SOURCE_CHARACTERS} at most")


def schema_source(field: str, schema: object) -> str:
    """Return a JSON schema, given as an object or as its text, as text, with little white space in its JSON.

    Raises:
        InvalidFieldError: it is no JSON object, too long or nested too deeply.
    """
    if isinstance(schema, str):
        check_length(field, schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidFieldError(field, f"it is no JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise InvalidFieldError(field, f"a {type(schema).__name__}; expected a JSON schema, which is an object")
    _check_depth(field, schema)
    source = json.dumps({"x-guidance": {"whitespace_pattern": _SPACE}, **schema}, ensure_ascii=False)
    check_length(field, source)
    return source


def quoted(text: str) -> str:
    """Return `text` as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _check_depth(field: str, schema: Mapping[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _parts(value)]
        if not level:
            return
    raise InvalidFieldError(field, f"nested more than {MAX_DEPTH} levels deep")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []
