"""What torchrun calls an option is a setting here, and both ways to give it end in the same configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch.config_file import load_config
from launch.options import ConfigArgument, SetOption
from launch.torchrun_options import with_torchrun_options
from tprt.config import Config
from tprt.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "deployment.yaml"
    path.write_text("model: {path: m}\nparallel: {tensor_parallel_size: 4}\nsupervision: {max_restarts: 7}\n")
    return str(path)


def parse(*arguments: str) -> Config | None:
    """Return the settings that a command with these arguments gets; None if it is not run."""
    found: list[Config] = []
    app = typer.Typer()

    @app.command()
    @with_torchrun_options
    def command(config: ConfigArgument, set_: SetOption = None) -> None:
        found.append(load_config(config, set_ or ()))

    CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return found[0] if found else None


def test_without_options_the_settings_are_those_of_the_file(file: str) -> None:
    assert parse(file) == load_config(file)


def test_options_win_over_the_file_and_over_set(file: str) -> None:
    options = "--nproc-per-node 3 --rdzv-id d --max-restarts 0 --log-dir /l --local-ranks-filter 0,2"
    config = parse(file, "--set", "parallel.tensor_parallel_size=2", *options.split())
    assert config is not None
    assert config.parallel.tensor_parallel_size == 3
    assert (config.hosts.nproc_per_node, config.hosts.rdzv_id) == ((3,), "d")
    assert config.supervision.max_restarts == 0
    assert (config.logging.dir, config.logging.local_ranks_filter) == ("/l", (0, 2))


@pytest.mark.parametrize(
    ("ranks", "expected"), [("2", (2, 2, 2)), ("1,2,4", (1, 2, 4))], ids=["one number", "one for each host"]
)
@pytest.mark.parametrize("way", ["--nnodes=3", "--set=hosts.nnodes=3", "--set=hosts={nnodes: 3}"])
def test_ranks_are_those_of_each_host_and_make_the_size_of_the_group(
    file: str, ranks: str, expected: tuple[int, ...], way: str
) -> None:
    config = parse(file, way, "--rdzv-endpoint", "h:29400", "--nproc-per-node", ranks)
    assert config is not None
    assert config.hosts.nproc_per_node == expected
    assert config.parallel.tensor_parallel_size == sum(expected)


def test_on_another_host_the_command_takes_part_in_the_deployment_of_node_rank_0(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents: list[Config] = []
    monkeypatch.setattr("launch.torchrun_options.run_agent", agents.append)
    assert parse(file, "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "h:29400") is None
    assert [agent.hosts.node_rank for agent in agents] == [1]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("--redirects 3", ()),
        ("-r 3 -t 0:3", (0,)),
        ("-r 1 --local-ranks-filter 1,2 -t 0:3,1:2", (1,)),
        ("--redirects 1:3,2:0", (0, 2, 3)),
        ("--redirects 0", (0, 1, 2, 3)),
        ("--tee 3", (0, 1, 2, 3)),
        ("--tee 3 --redirects 3 --local-ranks-filter 2", (2,)),
        ("-r 5:3 --set parallel.data_parallel_size=2", (0, 1, 2, 3, 4, 6, 7)),
    ],
)
def test_what_is_redirected_and_not_teed_is_in_files_alone(
    file: str, options: str, shown: tuple[int, ...]
) -> None:
    config = parse(file, "--log-dir", "/l", *options.split())
    assert config is not None
    assert config.logging.local_ranks_filter == shown


@pytest.mark.parametrize("value", ["4", "x", "0:4", "0:3,1", ":3"])
def test_streams_that_torchrun_would_not_know_are_refused(file: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--tee {value}: expected a number from 0 to 3"):
        parse(file, "--log-dir", "/l", "--tee", value)


def test_redirection_without_a_folder_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match="choose what is shown of the files in --log-dir; give that too"):
        parse(file, "--redirects", "3")


def test_ranks_that_are_no_numbers_are_refused(file: str) -> None:
    with pytest.raises(ConfigError, match="--local-ranks-filter 0,x: expected numbers separated by commas"):
        parse(file, "--local-ranks-filter", "0,x")


def test_python_m_launch_is_the_same_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "launch", "serve", "nowhere.yaml"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "tprt: there is no file nowhere.yaml; expected the YAML file of a deployment\n"
