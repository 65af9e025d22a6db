"""The listening socket of the HTTP server, and what must be right before it is of use.

Address, certificate and API keys are looked at before any process is started. Knows nothing of HTTP.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from pathlib import Path

from tprt.config import ServerConfig
from tprt.errors import ConfigError

API_KEY = "TPRT_API_KEY"
_BACKLOG = 2048


def take_api_keys(server: ServerConfig) -> tuple[str, ...]:
    """Return the keys of `server.api_key_file` and $TPRT_API_KEY, which is removed: no child needs to see it.

    Raises:
        ConfigError: the file cannot be read, has no key, or one that no header can carry.
    """
    given = os.environ.pop(API_KEY, "").strip()
    keys = {given: f"${API_KEY}"} if given else {}
    if server.api_key_file is not None:
        place = f"server.api_key_file {server.api_key_file}"
        keys |= dict.fromkeys(_read_keys(server.api_key_file, place), place)
    for key, place in keys.items():
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{place}: a key has spaces or characters beyond ASCII; no header can carry it")
    return tuple(keys)


def _read_keys(file: str, place: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} cannot be read: {_reason(error)}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{place} has no key; expected one a line")
    return keys


def check_certificate(server: ServerConfig) -> None:
    """Load the certificate as the server will.

    Raises:
        ConfigError: it cannot be read, or does not belong to its key.
    """
    if server.ssl_certfile is None:
        return
    # Without a password, which the server has nowhere to get from; OpenSSL would ask the terminal for it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"server.ssl_certfile {server.ssl_certfile} with ssl_keyfile {server.ssl_keyfile}:"
            f" {_reason(error)}; expected PEM files of a certificate and of its key, without a password"
        ) from error


def listen(server: ServerConfig, has_keys: bool) -> socket.socket:
    """Listen where `server` says.

    Raises:
        ConfigError: the address cannot be used, or anybody could reach a server without keys there.
    """
    try:
        place = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = place[0]
        if not (has_keys or server.allow_anonymous or _is_loopback(str(address[0]))):
            raise ConfigError(
                f"server.host {server.host} can be reached by others, and there is no API key; set"
                f" ${API_KEY} or server.api_key_file, or server.allow_anonymous to serve whoever comes"
            )
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"server.host {server.host}, server.port {server.port}: cannot listen there: {_reason(error)};"
            " choose another with --host and --port (port 0 takes a free one)"
        ) from error


def url_of(listener: socket.socket, server: ServerConfig) -> str:
    """Return the address of the server, with the port that it has got."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if server.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
