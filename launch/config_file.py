"""From a YAML file and `section.key=value` overrides to a `Config`, strictly.

Every problem is reported with its file and dotted key, all in one error; a key that does not exist comes with
the nearest that does. Types are those of YAML: `port: "80"` and `port: yes` are no numbers. Knows nothing of
what a setting does.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tprt.config import Config
from tprt.errors import ConfigError

_OVERRIDE = "--set"


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read the deployment in the YAML file `path`; `overrides` (`a.b=value`) win, later ones over earlier.

    Raises:
        ConfigError: lists every problem with file, dotted key, what was found and what was expected.
    """
    settings = _read_yaml(path)
    origin: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        made = _assign(settings, key, value)
        origin = {at: source for at, source in origin.items() if not at.startswith(f"{key}.")}
        origin |= dict.fromkeys((made, key), f"{_OVERRIDE} {override}")
    try:
        # By way of JSON, since only there does strict validation take a list for a tuple.
        return Config.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        problems = [_describe(problem, origin, path) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def peek_setting(path: str, overrides: Sequence[str], key: str, default: object) -> object:
    """Return what file and overrides say of one setting, before anything is checked; `default` if nothing.

    Raises:
        ConfigError: the file cannot be read, or an override is none.
    """
    settings = _read_yaml(path)
    for override in overrides:
        _assign(settings, *_parse_override(override))
    found: object = settings
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return default if found is None else found


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a deployment's settings, with the meaning of each."""
    return Config.model_json_schema()


def show(config: Config) -> str:
    """Return the resolved settings as YAML that loads back to the same configuration."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every section and setting."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key which is given twice, and aliases: they can nest without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor} is an alias; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            # It has the form of a date or of a number, as 2024-13-45 has, and is none.
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} cannot be read ({error}); put it in quotes", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is no text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; expected the YAML file of a deployment") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        context = f"{error.context}, " if error.context else ""
        raise ConfigError(f"{path}{line}: {context}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{path} holds {found}; expected sections such as model: and parallel:")
    return content


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{_OVERRIDE} {override}: expected section.key=value")
    try:
        return key, yaml.load(value, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{_OVERRIDE} {override}: the value is not YAML: {error}") from error


def _assign(settings: dict[str, Any], key: str, value: object) -> str:
    """Set `key`, and return the outermost section that had to be made for it (`key` if none)."""
    *sections, name = key.split(".")
    made = key
    for depth, section in enumerate(sections, start=1):
        if section not in settings and made == key:
            made = ".".join(sections[:depth])
        inner = settings.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{_OVERRIDE} {key}: {section} is {inner!r}, which has no keys")
        settings = inner
    settings[name] = value
    return made


def _describe(problem: Any, origin: Mapping[str, str], path: str) -> str:
    """Say where one of pydantic's findings is, what was found, and what to do."""
    location = _location(problem)
    key = ".".join(location)
    if problem["type"] == "missing":
        return f"{path}: {key} is missing; it must be given"
    source = next(
        (origin[at] for n in range(len(location), 0, -1) if (at := ".".join(location[:n])) in origin), path
    )
    if problem["type"] == "extra_forbidden":
        return f"{source}: there is no setting {key}{_suggestion(key)}"
    if problem["type"] == "model_type":
        example = next(known for known in known_keys() if known.startswith(f"{key}."))
        found = "empty" if problem["input"] is None else repr(problem["input"])
        return f"{source}: {key} is {found}; expected settings such as {example}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{source}: {key}: {message}"
    return f"{source}: {key} is {problem['input']!r}; {message}"


def _location(problem: Any) -> list[str]:
    """Return where a problem is, without pydantic's names for the kinds of value that a setting may have."""
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return location
    depths = {known.count(".") + 1 for known in known_keys() if ".".join(location).startswith(known)}
    depth = max(depths, default=len(location))
    return location[:depth] + [part for part in location[depth:] if part.isdigit()]


def _suggestion(key: str) -> str:
    """Return the nearest known key: by its last part wherever that is, else by the whole of it."""
    keys = list(known_keys())
    last = key.rpartition(".")[2]
    by_last = [known for known in keys if known.rpartition(".")[2] == last]
    near = by_last or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not near:
        tails = difflib.get_close_matches(last, [known.rpartition(".")[2] for known in keys], n=1)
        near = [known for known in keys if tails and known.rpartition(".")[2] == tails[0]]
    return f"; did you mean {near[0]}?" if near else ""
