"""`tprt`: the command line. Assembles the commands, and turns errors into one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from launch import config_command
from launch.bench import command as bench_command
from launch.chat_command import chat
from launch.doctor_command import doctor
from launch.exit_codes import EXIT_INTERRUPTED, leave_with
from launch.generate_command import generate
from launch.planning.command import plan
from launch.serving.command import serve
from launch.status_command import status
from launch.stop_command import stop
from launch.torchrun_options import with_torchrun_options
from tprt.errors import TprtError

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


def _open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed (`>&-`), before a socket gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number, which is its own.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, that of this process if there are no `arguments`; the console script `tprt`."""
    _open_standard_streams()
    try:
        app(arguments, prog_name="tprt")
    except TprtError as error:
        leave_with(error)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
