"""Two hosts on one machine: network namespaces that a veth pair joins, and a link that can be cut."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class TwoHosts:
    """The namespaces, by node rank, and the addresses of their ends of the link."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def on(self, node_rank: int, command: Sequence[str]) -> list[str]:
        """Return a command line that runs `command` on one of the hosts."""
        return ["ip", "netns", "exec", self.names[node_rank], *command]

    def cut(self) -> None:
        """Cut the link; whoever is connected is not told."""
        _ip("-n", self.names[0], "link", "set", "link0", "down")

    def restore(self) -> None:
        """Join the hosts again."""
        _ip("-n", self.names[0], "link", "set", "link0", "up")


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make two hosts, or skip the test where this machine does not allow that."""
    names = (f"tprt-{os.getpid()}-0", f"tprt-{os.getpid()}-1")
    hosts = TwoHosts(names, ("10.213.77.1", "10.213.77.2"))
    made = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "link1", "netns", names[1])
            for node_rank, (name, address) in enumerate(zip(names, hosts.addresses, strict=True)):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", f"link{node_rank}")
                _ip("-n", name, "link", "set", f"link{node_rank}", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            pytest.skip(f"network namespaces cannot be made here: {said}")
        yield hosts
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)
