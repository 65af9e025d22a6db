"""Reads one tool call, `{"name": "...", "arguments": {...}}`, whose text comes in pieces.

The name is known as soon as it is complete, and the text of the arguments comes as it is written. Keys may be
in any order, `type` and `id` are passed over, and `parameters` is as good as `arguments`; an object with
another key is no call. Knows nothing of what stands around the object, and of which tools there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum

_SPACE = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)
# What may stand in a value outside of its strings.
_IN_VALUE = frozenset(" \t\n\r{}[],:-+.0123456789eEtrufalsn")
_NO_ARGUMENTS = "{}"


class ObjectState(Enum):
    """How far the object has been read."""

    OPEN = "more of it is to come"
    CLOSED = "its last character was read"
    BROKEN = "the next character cannot be part of it"


class ToolCallObject:
    """One object, character by character.

    Attributes:
        state: where reading stands; once it is not `OPEN`, no more is read.
        name: the tool's name, once it is known.
        has_arguments: the arguments have begun, or the object is closed and has none.
        text: all that was read.
    """

    def __init__(self) -> None:
        self.state = ObjectState.OPEN
        self.name: str | None = None
        self.has_arguments = False
        self._text: list[str] = []
        self._arguments: list[str] = []
        self._read: Callable[[str], bool] = self._read_start
        self._key = ""
        self._string: list[str] = []
        self._on_end: Callable[[str], bool] = self._end_key
        self._is_escaped = False
        self._depth = 0
        self._in_string = False

    @property
    def text(self) -> str:
        """All that was read, as it was."""
        return "".join(self._text)

    @property
    def is_call(self) -> bool:
        """Tell whether this is certainly a tool call."""
        return self.name is not None and self.has_arguments

    def feed(self, text: str) -> int:
        """Read on; return how many characters of `text` belong to the object."""
        used = 0
        while used < len(text) and self.state is ObjectState.OPEN:
            if not self._read(text[used]):
                self.state = ObjectState.BROKEN
                break
            used += 1
        self._text.append(text[:used])
        return used

    def take_arguments(self) -> str:
        """Return the text of the arguments that has come since the last call."""
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    def _read_start(self, character: str) -> bool:
        if character == "{":
            self._read = self._read_first_key
            return True
        return character in _SPACE

    def _read_first_key(self, character: str) -> bool:
        return self._close() if character == "}" else self._read_key_start(character)

    def _read_key_start(self, character: str) -> bool:
        if character == '"':
            self._begin_string(self._end_key)
            return True
        return character in _SPACE

    def _end_key(self, key: str) -> bool:
        self._key = key
        self._read = self._read_colon
        is_second = key in _ARGUMENTS and self.has_arguments
        return not is_second and (key in _KEYS or self.is_call)

    def _read_colon(self, character: str) -> bool:
        if character == ":":
            self._read = self._read_value_start
            return True
        return character in _SPACE

    def _read_value_start(self, character: str) -> bool:
        if character in _SPACE:
            return True
        if character == '"':
            self._begin_string(self._end_string_value)
            return True
        if self._key == "name" or (self._key in _ARGUMENTS and character != "{"):
            return False
        self._depth = 0
        self._in_string = False
        self._read = self._read_value
        if self._key in _ARGUMENTS:
            self.has_arguments = True
        return self._read_value(character)

    def _end_string_value(self, value: str) -> bool:
        if self._key == "name":
            self.name = value
        elif self._key in _ARGUMENTS:
            # Some models write the arguments as a string that holds the JSON.
            self.has_arguments = True
            self._arguments.append(value)
        self._read = self._read_after_value
        return True

    def _read_value(self, character: str) -> bool:
        """Read an object, a list, a number or a word."""
        if self._in_string:
            self._read_inside_string(character)
        elif self._depth == 0 and character in ",}":
            return self._read_after_value(character)
        elif character == '"':
            self._in_string = True
        elif character in _IN_VALUE:
            self._depth += (character in "{[") - (character in "}]")
            if self._depth == 0 and character in "}]":
                self._read = self._read_after_value
        else:
            return False
        if self._key in _ARGUMENTS:
            self._arguments.append(character)
        return self._depth >= 0

    def _read_inside_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False

    def _read_after_value(self, character: str) -> bool:
        if character == ",":
            self._read = self._read_key_start
            return True
        return self._close() if character == "}" else character in _SPACE

    def _close(self) -> bool:
        self.state = ObjectState.CLOSED
        if self.name is not None and not self.has_arguments:
            self.has_arguments = True
            self._arguments.append(_NO_ARGUMENTS)
        return True

    def _begin_string(self, on_end: Callable[[str], bool]) -> None:
        """Read a string whole, and hand its value to `on_end`."""
        self._string = ['"']
        self._in_string = True
        self._on_end = on_end
        self._read = self._read_string

    def _read_string(self, character: str) -> bool:
        self._string.append(character)
        self._read_inside_string(character)
        if self._in_string:
            return True
        try:
            value = json.loads("".join(self._string))
            value.encode()
        except ValueError:  # no JSON, or half a surrogate pair, which nobody could pass on
            return False
        return self._on_end(value)
