"""Addresses and interfaces of this host.

Knows nothing of who connects.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from tprt.config import HostsConfig, split_endpoint
from tprt.errors import ConfigError

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40
_MAX_INTERFACES = 256
_BACKLOG = 512


def listen(hosts: HostsConfig) -> socket.socket:
    """Listen at `hosts.rdzv_endpoint`, an address of this host.

    Raises:
        ConfigError: it is none, or the port is in use.
    """
    assert hosts.rdzv_endpoint is not None
    host, port = split_endpoint(hosts.rdzv_endpoint)
    try:
        return listen_on(host, port)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else error
        raise ConfigError(
            f"hosts.rdzv_endpoint {hosts.rdzv_endpoint}: node rank 0 cannot listen there: {reason};"
            " expected an address of this host and a free port"
        ) from error


def listen_on(host: str, port: int) -> socket.socket:
    """Listen on an address of this host; port 0 takes a free one.

    Raises:
        OSError: it cannot be used.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=_BACKLOG)


def choose_interface(hosts: HostsConfig, address: str) -> str:
    """Return the interface for what goes between ranks: the one that was set, or the one with `address`.

    Raises:
        ConfigError: there is no such interface.
    """
    names = [name for _, name in socket.if_nameindex()]
    if hosts.interface is not None:
        if hosts.interface not in names:
            raise ConfigError(f"hosts.interface {hosts.interface}: this host has {', '.join(names)}")
        return hosts.interface
    found = [name for name, own in _addresses() if ipaddress.ip_address(own) == _plain(address)]
    if not found:
        raise ConfigError(f"no interface of this host has {address}; set hosts.interface to one of {names}")
    return found[0]


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _addresses() -> list[tuple[str, str]]:
    """Return (interface, address) of this host, IPv4 first; netdevice(7) and /proc/net/if_inet6."""
    requests = array.array("B", bytes(_IFREQ_BYTES * _MAX_INTERFACES))
    pointer, num_bytes = requests.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iL", num_bytes, pointer))
    filled, data = struct.unpack("iL", answer)[0], requests.tobytes()
    found = []
    for at in range(0, filled, _IFREQ_BYTES):
        name = data[at : at + 16].partition(b"\0")[0].decode().partition(":")[0]
        found.append((name, socket.inet_ntoa(data[at + 20 : at + 24])))
    return found + _addresses_of_ipv6()


def _addresses_of_ipv6() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [(field[5], str(ipaddress.IPv6Address(int(field[0], 16)))) for field in fields]
