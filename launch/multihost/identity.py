"""What this host is within its deployment: its secret and its card.

Knows nothing of connections.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.child import HOSTS_SECRET
from launch.multihost.card import HostCard
from launch.multihost.checkpoint_digest import digest_checkpoint
from tprt.config import Config, HostsConfig
from tprt.errors import ConfigError
from tprt.transport.challenge import prove

_MIN_CHARS = 16
# What may differ from host to host: where things are, and what only node rank 0 looks at.
_OWN_SECTIONS = ("logging", "server")
_OWN_KEYS = ("model.path", "hosts.node_rank", "hosts.rdzv_endpoint", "hosts.secret_file", "hosts.interface")


def take_secret(hosts: HostsConfig) -> bytes:
    """Return the secret of all hosts; it leaves this process's environment, since few children need to see it.

    Raises:
        ConfigError: there is none, or it is too short.
    """
    given = os.environ.pop(HOSTS_SECRET, "").strip()
    place = f"${HOSTS_SECRET}"
    if hosts.secret_file is not None:
        place = f"hosts.secret_file {hosts.secret_file}"
        try:
            given = Path(hosts.secret_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{place} cannot be read: {reason}") from error
    if not given:
        raise ConfigError(
            f"a deployment over several hosts needs a secret that all of them share: set hosts.secret_file or"
            f" ${HOSTS_SECRET}, to the output of `openssl rand -hex 32` for instance"
        )
    if len(given) < _MIN_CHARS:
        raise ConfigError(f"{place} has {len(given)} characters; expected a secret of at least {_MIN_CHARS}")
    return given.encode()


def steps_token(secret: bytes, hosts: HostsConfig) -> str:
    """Return what opens the lanes of steps; ranks get this and not the secret."""
    return prove(secret, "steps", hosts.rdzv_id.encode()).hex()


def make_card(config: Config) -> HostCard:
    """Return what this host says of itself.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    settings = dict(_flatten(config.model_dump(mode="json")))
    return HostCard(
        rdzv_id=config.hosts.rdzv_id,
        node_rank=config.hosts.node_rank,
        instance=uuid.uuid4().hex,
        host=socket.gethostname(),
        version=version("tprt"),
        settings={key: value for key, value in settings.items() if key not in _OWN_KEYS},
        checkpoint=digest_checkpoint(config.model.path),
    )


def _flatten(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for section, values in settings.items():
        if section not in _OWN_SECTIONS:
            yield from ((f"{section}.{name}", value) for name, value in values.items())
