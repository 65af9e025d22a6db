"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from tprt.config import ModelConfig
from tprt.server.sampling_defaults import SamplingDefaults, read_sampling_defaults

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the deployment.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="0 takes the most likely token; left out: the model's (generation_config.json), or 0."),
]
TopKOption = Annotated[
    int | None, typer.Option(help="Sample from the k most likely tokens; 0: from all; left out: the model's.")
]
TopPOption = Annotated[
    float | None, typer.Option(help="Sample from the smallest set of this probability; left out: the model's.")
]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]


def chosen_sampling(model: ModelConfig, **options: float | None) -> SamplingDefaults:
    """Return what the options of a command line say, and where they are left out, what the checkpoint says.

    Where neither does, the most likely token is taken: whoever tries a model expects the same text again.

    Raises:
        CheckpointError: generation_config.json cannot be used.
    """
    return read_sampling_defaults(model, temperature=0.0).with_given(**options)
