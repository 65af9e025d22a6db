"""Whether the server can listen where it is to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launch.doctor.finding import Finding, ok, refused, skipped
from launch.doctor.request import DoctorRequest
from launch.serving.http_socket import check_certificate, listen, take_api_keys, url_of
from tprt.errors import ConfigError

# The state of a listening socket in /proc/net/tcp (proc(5)).
_LISTENS = "0A"


def check_server(request: DoctorRequest) -> Iterator[Finding]:
    """Listen as `tprt serve` would, and stop."""
    server = request.config.server
    if request.config.hosts.node_rank > 0:
        yield skipped("server", "it is on the host of node rank 0")
        return
    try:
        check_certificate(server)
        with listen(server, bool(take_api_keys(server))) as listener:
            yield ok("server", f"{url_of(listener, server)} is free")
    except ConfigError as error:
        finding = refused("server", error, "set server.host and server.port to an address that is free")
        holder = holder_of(server.port)
        yield replace(finding, found=f"{finding.found}; held by {holder}") if holder else finding


def holder_of(port: int) -> str:
    """Return who listens on a TCP port of this host, as far as this user may know; else ""."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = (line.split() for line in table.read_text().splitlines()[1:]) if table.exists() else ()
        inodes |= {row[9] for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port}
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        try:
            if os.readlink(link) in {f"socket:[{inode}]" for inode in inodes}:
                process = link.parent.parent
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return ""
