"""`tprt`: the command line. Assembles the commands, and turns errors into one message and an exit code."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from launch import config_command
from launch.bench import command as bench_command
from launch.chat_command import chat
from launch.doctor_command import doctor
from launch.failure import INPUT_ERRORS
from launch.generate_command import generate
from launch.planning.command import plan
from launch.serving.command import serve
from launch.status_command import status
from launch.stop_command import stop
from launch.torchrun_options import with_torchrun_options
from tprt.errors import TprtError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="A tensor-parallel runtime for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(serve)
app.command()(generate)
app.command()(chat)
app.command()(plan)
app.command()(with_torchrun_options(doctor, on_every_host=True))
app.command()(status)
app.command()(stop)
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
        app(prog_name="tprt")
    except TprtError as error:
        print(f"tprt: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, INPUT_ERRORS) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
