"""`tprt`: the command line. Assembles the commands, and turns errors into one message and an exit code."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from launch import bench_command, config_command
from launch.generate_command import generate
from tprt.errors import EngineDeadError, TprtError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="A tensor-parallel runtime for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.add_typer(config_command.app, name="config")
app.add_typer(bench_command.app, name="bench")


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(version("tprt"))
        raise typer.Exit


def main() -> None:
    """Run the command line; the console script `tprt`."""
    try:
        code = app(standalone_mode=False)
    except TprtError as error:
        print(f"tprt: {error}", file=sys.stderr)
        code = EXIT_FAILED if isinstance(error, EngineDeadError) else EXIT_BAD_INPUT
    except typer.Abort:
        code = EXIT_INTERRUPTED
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)
