"""Every configuration that ships loads, and its name says what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.config_file import load_config

CONFIGS = sorted(Path("configs").glob("*.yaml"))
NAME = re.compile(r"(?P<model>[a-z0-9.-]+)-tp(?P<ranks>\d+)(-(?P<hardware>[a-z0-9]+))?")


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_loads_and_is_named_for_its_model_and_ranks(path: Path) -> None:
    config = load_config(str(path))
    name = NAME.fullmatch(path.stem)
    assert name is not None
    assert config.parallel.tensor_parallel_size == int(name["ranks"])
    assert Path(config.model.path).name.lower().startswith(name["model"])
    assert (config.runtime.device == "cpu") == (name["hardware"] == "cpu")
