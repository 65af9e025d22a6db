"""`tprt config`: what a deployment's settings are, and what settings there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from launch.config_file import config_schema, load_config, show
from launch.config_reference import reference
from launch.options import ConfigArgument, SetOption

app = typer.Typer(help="Show settings, or what settings there are.", no_args_is_help=True)


@app.command("show")
def show_config(config: ConfigArgument, set_: SetOption = None) -> None:
    """Print the resolved settings of a deployment, as YAML."""
    print(show(load_config(config, set_ or ())), end="")


@app.command("schema")
def schema(
    indent: Annotated[int, typer.Option(help="Spaces to indent by.")] = 2,
) -> None:
    """Print the JSON schema of the settings, with the meaning of each."""
    print(json.dumps(config_schema(), indent=indent))


@app.command("reference")
def print_reference() -> None:
    """Print the reference page of all settings, in Markdown."""
    print(reference(), end="")
