"""`tprt bench`: measurements, each with a peer beside it in the same run."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launch.config_file import load_config
from launch.options import ConfigArgument, JsonOption, SetOption

app = typer.Typer(help="Measure, with a peer beside in the same run.", no_args_is_help=True)


@app.command("compare-hf")
def compare_hf(
    config: ConfigArgument,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 48,
    repeats: Annotated[int, typer.Option(help="Measured rounds, after one to warm up.")] = 3,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Tokens per second beside transformers' generate, same model, dtype and threads."""
    from launch.bench_compare_hf import Workload, compare_with_hf
    from tprt.checkpoint_config import read_checkpoint_config

    resolved = load_config(config, set_ or ())
    vocab_size = read_checkpoint_config(resolved.model.path).vocab_size
    workloads = [Workload(int(batch), prompt_len, new_tokens) for batch in batches.split(",")]
    print_rows(compare_with_hf(resolved, vocab_size, workloads, repeats), as_json)


def print_rows(rows: list[dict[str, float]], as_json: bool) -> None:
    """Print measurements as JSON lines, or as a table."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
