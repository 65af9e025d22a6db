"""Reads streams of server-sent events, and insists on their form."""

from __future__ import annotations

import json
from typing import Any


def chunks_of(text: str) -> list[dict[str, Any]]:
    """Return the objects of a stream that was complete: its last event is `[DONE]`."""
    events = events_of(text)
    assert events[-1:] == ["[DONE]"], f"the stream has no end: {text[-200:]!r}"
    return [json.loads(event) for event in events[:-1]]


def events_of(text: str) -> list[str]:
    """Return what each event carries."""
    assert text.endswith("\n\n")
    blocks = text[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[len("data: ") :] for block in blocks]


def chat_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Return the text of a choice of a chat stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def finish_reasons(chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    """Return the finish reasons that a choice has had, of which there should be one."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
