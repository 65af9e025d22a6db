"""The reference page of all settings, from their declarations; `docs/configuration.md` is its output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tprt.config import Config

_HEAD = """# Settings

One YAML file per deployment, one section for each heading here. `--set section.key=value` overrides a setting
on the command line. This page is what `tprt config reference` prints.
"""


def reference() -> str:
    """Return the page, in Markdown."""
    return "\n".join([_HEAD, *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    for section, field in Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        yield f"## {section}\n\n{field.description}\n\n| key | type | default | meaning |\n|---|---|---|---|"
        for name, setting in model.model_fields.items():
            yield f"| `{name}` | {_type(model, name)} | {_default(setting)} | {setting.description} |"
        yield ""


def _default(setting: FieldInfo) -> str:
    if setting.is_required():
        return "required"
    value = setting.default
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(model: type[BaseModel], name: str) -> str:
    """Say what a setting takes, from its JSON schema."""
    schema = model.model_json_schema()["properties"][name]
    return " or ".join(_option(option) for option in _options(schema) if option.get("type") != "null")


def _options(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a setting may be, whichever way that is nested."""
    inner = schema.get("anyOf") or schema.get("oneOf")
    if inner is None:
        yield schema
    for option in inner or ():
        yield from _options(option)


def _option(option: dict[str, Any]) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "const" in option:
        return f"`{option['const']}`"
    kind = str(option["type"])
    if kind == "array":
        return f"list of {option['items']['type']}s"
    return kind + _bounds(option)


def _bounds(option: dict[str, object]) -> str:
    low, above, high = (option.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f", {low} to {high}"
    lower = f", {low} or more" if low is not None else f", above {above}" if above is not None else ""
    return lower + (f", at most {high}" if high is not None else "")
