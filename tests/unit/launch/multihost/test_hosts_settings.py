"""Settings of several hosts that cannot work are refused; hosts compare those that must agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launch.config_file import load_config
from launch.deployment import Deployment
from launch.multihost.card import why_refused
from launch.multihost.identity import make_card, steps_token, take_secret
from launch.multihost.network import choose_interface, listen, listen_on
from tprt.config import Config, HostsConfig
from tprt.errors import ConfigError

SECRET = "0123456789abcdef"
TWO = ["hosts.nnodes=2", "hosts.rdzv_endpoint=127.0.0.1:29400", "parallel.tensor_parallel_size=2"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "deployment.yaml"
    path.write_text(f"model: {{path: {tmp_path}}}\n")
    return str(path)


@pytest.fixture(autouse=True)
def no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPRT_HOSTS_SECRET", raising=False)


def load(file: str, *overrides: str) -> Config:
    return load_config(file, [*TWO, *overrides])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hosts.node_rank=2", "node_rank is 2 and nnodes 2; expected 0 to 1"),
        ("hosts.rdzv_endpoint=null", "nnodes is 2 without rdzv_endpoint; give host:port of node rank 0"),
        ("hosts.rdzv_endpoint=10.0.0.1", "'10.0.0.1' is no endpoint; expected host:port, as in 10.0.0.1:29400"),
        ("hosts.rdzv_endpoint='h:70000'", "'h:70000' is no endpoint"),
        (
            "hosts.nproc_per_node=[2]",
            "nproc_per_node has 1 entries and nnodes is 2; give the ranks",
        ),
        (
            "hosts.nproc_per_node=[1, 2]",
            "hosts.nproc_per_node [1, 2] is 3 ranks, and parallel.tensor",
        ),
        (
            "parallel.tensor_parallel_size=3",
            "3 does not spread evenly over hosts.nnodes 2; give hosts.",
        ),
        (
            "parallel.all_reduce=shm",
            "parallel.all_reduce is shm, which joins ranks of one host; use auto",
        ),
        (
            "parallel.rank_weights=auto",
            "parallel.rank_weights is auto, which looks at one host; give one",
        ),
    ],
)
def test_what_cannot_work_is_refused(file: str, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(file, override)


def test_ranks_are_numbered_host_by_host(file: str) -> None:
    assert [load(file).ranks_of(node_rank) for node_rank in (0, 1)] == [range(1), range(1, 2)]
    uneven = load(file, "hosts.nproc_per_node=[1, 4]", "parallel.tensor_parallel_size=5")
    assert [uneven.ranks_of(node_rank) for node_rank in (0, 1)] == [range(1), range(1, 5)]


def test_a_deployment_starts_on_node_rank_0_alone(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 96,'
        ' "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,'
        ' "max_position_embeddings": 64, "rms_norm_eps": 1e-5}'
    )
    with pytest.raises(ConfigError, match=r"hosts\.node_rank is 1: a deployment is started on node rank 0"):
        Deployment(load(file, "hosts.node_rank=1"))
    with pytest.raises(ConfigError, match="needs a secret that all of them share"):
        Deployment(load(file))


def test_the_secret_comes_from_the_environment_once_or_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPRT_HOSTS_SECRET", f" {SECRET}\n")
    assert take_secret(HostsConfig()) == SECRET.encode()
    with pytest.raises(ConfigError, match=r"set hosts\.secret_file or \$TPRT_HOSTS_SECRET"):
        take_secret(HostsConfig())
    (tmp_path / "secret").write_text(f"{SECRET}2\n")
    assert take_secret(HostsConfig(secret_file=str(tmp_path / "secret"))) == f"{SECRET}2".encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [("short", "has 5 characters; expected a secret of at least 16"), (None, "cannot be read: No such file")],
)
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        take_secret(HostsConfig(secret_file=str(file)))


def test_ranks_do_not_get_the_secret_itself() -> None:
    tokens = {steps_token(SECRET.encode(), HostsConfig(rdzv_id=name)) for name in ("a", "b")}
    assert len(tokens) == 2
    assert not any(SECRET in token for token in tokens)


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("cache.num_blocks=7", True),
        ("runtime.device=cpu", True),
        ("hosts.heartbeat_timeout_s=7", True),
        ("logging.level=debug", False),
        ("server.port=7", False),
        ("hosts.interface=eth7", False),
        ("hosts.rdzv_endpoint='other-name:29400'", False),
    ],
)
def test_settings_that_may_differ_from_host_to_host_are_not_compared(
    file: str, override: str, is_refused: bool
) -> None:
    own, other = make_card(load(file)), make_card(load(file, "hosts.node_rank=1", override))
    key = override.partition("=")[0]
    assert (key in why_refused(own, other, 2)) == is_refused
    assert bool(why_refused(own, other, 2)) == is_refused


def test_the_interface_is_the_one_that_has_the_address_or_was_set() -> None:
    assert choose_interface(HostsConfig(), "127.0.0.1") == "lo"
    assert choose_interface(HostsConfig(), "::ffff:127.0.0.1") == "lo"
    assert choose_interface(HostsConfig(interface="lo"), "192.0.2.77") == "lo"
    with pytest.raises(ConfigError, match=r"no interface of this host has 192\.0\.2\.77; set hosts\.interface"):
        choose_interface(HostsConfig(), "192.0.2.77")
    with pytest.raises(ConfigError, match=r"hosts\.interface eth77: this host has .*lo"):
        choose_interface(HostsConfig(interface="eth77"), "127.0.0.1")


def endpoint(value: str) -> HostsConfig:
    settings: dict[str, Any] = {"nnodes": 2, "rdzv_endpoint": value}
    return HostsConfig(**settings)


def test_an_endpoint_where_nobody_can_listen_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"endpoint 192\.0\.2\.77:29400: node rank 0 cannot listen there"):
        listen(endpoint("192.0.2.77:29400"))


def test_a_port_in_use_is_refused() -> None:
    with listen_on("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="Address already in use; expected an address of this host and"):
            listen(endpoint(f"127.0.0.1:{port}"))
