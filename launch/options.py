"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the deployment.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopKOption = Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: from all.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the smallest set with this probability.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]
