"""Whether the server can listen where it is to, and whether other hosts can be reached."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.request import DoctorRequest
from launch.serving.http_socket import check_certificate, listen, take_api_keys, url_of
from tprt.errors import ConfigError

_REACH_S = 3.0
# The state of a listening socket in /proc/net/tcp (proc(5)).
_LISTENS = "0A"
# adjtimex(2): nothing keeps the clock right.
_STA_UNSYNC = 0x40


def check_server(request: DoctorRequest) -> Iterator[Finding]:
    """Listen as `tprt serve` would, and stop."""
    server = request.config.server
    try:
        check_certificate(server)
        with listen(server, bool(take_api_keys(server))) as listener:
            yield ok("server", f"{url_of(listener, server)} is free")
    except ConfigError as error:
        finding = refused("server", error, "set server.host and server.port to an address that is free")
        holder = holder_of(server.port)
        yield replace(finding, found=f"{finding.found}; held by {holder}") if holder else finding
    yield _rendezvous()


def _rendezvous() -> Finding:
    """Listen where torchrun and the like have ranks of several hosts meet."""
    name, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not port.isdecimal():
        return skipped("rendezvous", "ranks of one host meet in the run directory; no $MASTER_PORT is set")
    try:
        socket.create_server((name, int(port))).close()
    except (OSError, OverflowError) as error:
        if isinstance(error, socket.gaierror) or getattr(error, "errno", 0) == errno.EADDRNOTAVAIL:
            return skipped("rendezvous", f"{name}:{port} is no address of this host; reach it with --host")
        holder = holder_of(int(port))
        found = f"cannot listen at {name}:{port}: {error}{f'; held by {holder}' if holder else ''}"
        return bad("rendezvous", found, "choose another $MASTER_PORT, the same on all hosts")
    return ok("rendezvous", f"{name}:{port} is free")


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


def check_other_hosts(request: DoctorRequest) -> Iterator[Finding]:
    """Connect to each of the hosts that were named, all at once, and look at this host's clock."""
    if not request.hosts:
        yield skipped("other hosts", "none was named with --host")
        return
    pool = ThreadPoolExecutor(len(request.hosts))
    timeout_s = request.left_s(_REACH_S)
    tries = [pool.submit(_reach, host, port, timeout_s) for host, port in request.hosts]
    end_s = time.monotonic() + timeout_s
    for (host, port), attempt in zip(request.hosts, tries, strict=True):
        name = f"host {host}:{port}"
        fix = (
            "start what listens there, open the port in its firewall, or name the address of another interface"
        )
        try:
            seconds, own_address = attempt.result(max(0.0, end_s - time.monotonic()))
            yield ok(name, f"connected from {own_address} in {seconds * 1e3:.1f} ms", seconds=seconds)
        except socket.gaierror as error:
            yield bad(
                name, f"the name is not known: {error.strerror}", "correct it, or add it to /etc/hosts or DNS"
            )
        except TimeoutError:
            yield bad(name, f"no answer in {timeout_s:.1f} s", fix)
        except OSError as error:
            yield bad(name, f"cannot be reached: {error.strerror}", fix)
    yield _clock()


def _reach(host: str, port: int, timeout_s: float) -> tuple[float, str]:
    """Return how long it takes to connect, and from which address of this host that goes."""
    began_s = time.monotonic()
    with socket.create_connection((host, port), timeout_s) as connection:
        return time.monotonic() - began_s, str(connection.getsockname()[0])


class _Timex(ctypes.Structure):
    """The beginning of adjtimex(2)'s structure, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def _clock() -> Finding:
    """Say whether this host's clock is kept right; the skew of others is not known, since nobody tells it."""
    timex = _Timex()
    ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    unknown = "the skew between hosts was not measured, since no service there tells its time"
    if timex.status & _STA_UNSYNC:
        fix = "start chrony or systemd-timesyncd on every host; logs of several hosts are hard to read without"
        return warning("clock", f"nothing keeps this host's clock right; {unknown}", fix)
    return ok("clock", f"kept within {timex.maxerror / 1e3:.0f} ms; {unknown}", max_error_us=timex.maxerror)
