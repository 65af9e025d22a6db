"""Lists of numbers in, rows of measurements out: what the benchmarks' commands share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from tprt.errors import ConfigError


def split_numbers(option: str, text: str) -> list[int]:
    """Return the numbers that the value of `option` lists."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: expected whole numbers separated by commas") from error
    if min(numbers) < 1:
        raise ConfigError(f"{option} {text}: expected whole numbers of 1 or more")
    return numbers


def print_rows(rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Print measurements as JSON lines, or as a table."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    Console().print(table)
