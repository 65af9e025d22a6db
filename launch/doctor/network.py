"""Whether the server can listen where it is to."""

from __future__ import annotations

from collections.abc import Iterator

from launch.doctor.finding import Finding, ok, refused
from launch.doctor.request import DoctorRequest
from launch.http_socket import check_certificate, listen, take_api_keys, url_of
from tprt.errors import ConfigError


def check_server(request: DoctorRequest) -> Iterator[Finding]:
    """Listen as `tprt serve` would, and stop."""
    server = request.config.server
    try:
        check_certificate(server)
        with listen(server, bool(take_api_keys(server))) as listener:
            yield ok("server", f"{url_of(listener, server)} is free")
    except ConfigError as error:
        yield refused("server", error, "set server.host and server.port to an address that is free")
