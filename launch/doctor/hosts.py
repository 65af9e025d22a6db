"""Whether the hosts of a deployment can meet, others that were named be reached, and the clock be trusted."""

from __future__ import annotations

import ctypes
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.network import holder_of
from launch.doctor.request import DoctorRequest
from launch.multihost.identity import take_secret
from launch.multihost.network import choose_interface, listen
from launch.rank_specs import LOOPBACK
from tprt.config import HostsConfig, split_endpoint
from tprt.errors import ConfigError

_REACH_S = 3.0
# adjtimex(2): nothing keeps the clock right.
_STA_UNSYNC = 0x40
_FIREWALL = "start what listens there, open the port in its firewall, or name the address of another interface"


def check_hosts(request: DoctorRequest) -> Iterator[Finding]:
    """Look at where the hosts of the deployment meet, and connect to those that were named."""
    hosts = request.config.hosts
    if hosts.nnodes == 1:
        yield skipped("rendezvous", "the deployment is on one host: its ranks meet in the run directory")
    else:
        yield _secret(hosts)
        yield _listening(hosts) if hosts.node_rank == 0 else _meeting(request)
        yield _interface(hosts)
    if not request.hosts:
        yield skipped("other hosts", "none was named with --host")
    else:
        yield from _reach_all(request)
    if hosts.nnodes > 1 or request.hosts:
        yield _clock()


def _secret(hosts: HostsConfig) -> Finding:
    try:
        take_secret(hosts)
    except ConfigError as error:
        return refused("secret", error, "set hosts.secret_file to a file that all hosts have")
    return ok("secret", "there is one; whether all hosts have the same is seen when they meet")


def _listening(hosts: HostsConfig) -> Finding:
    """Listen where node rank 0 waits for the other hosts, and stop."""
    assert hosts.rdzv_endpoint is not None
    try:
        listen(hosts).close()
    except ConfigError as error:
        holder = holder_of(split_endpoint(hosts.rdzv_endpoint)[1])
        fix = "set hosts.rdzv_endpoint to an address of this host and a free port, the same on all hosts"
        return bad("rendezvous", f"{error}{f'; held by {holder}' if holder else ''}", fix)
    return ok("rendezvous", f"{hosts.rdzv_endpoint} is free")


def _meeting(request: DoctorRequest) -> Finding:
    """Connect to where node rank 0 waits, which it may not do yet."""
    endpoint = request.config.hosts.rdzv_endpoint
    assert endpoint is not None
    try:
        seconds, own_address = _reach(*split_endpoint(endpoint), request.left_s(_REACH_S))
    except OSError as error:
        found = f"node rank 0 does not answer at {endpoint}: {error.strerror or error}"
        return warning("rendezvous", found, "start it first, and open the port in its firewall")
    return ok("rendezvous", f"node rank 0 answers at {endpoint}, to {own_address} in {seconds * 1e3:.1f} ms")


def _interface(hosts: HostsConfig) -> Finding:
    try:
        return ok("interface", f"ranks of several hosts use {interface_of(hosts)}")
    except ConfigError as error:
        return refused("interface", error, "set hosts.interface to one of these, or none")
    except OSError as error:
        fix = "set hosts.interface, or a name in hosts.rdzv_endpoint that is known here"
        return bad("interface", f"the way to {hosts.rdzv_endpoint} is not known: {error.strerror}", fix)


def interface_of(hosts: HostsConfig) -> str:
    """Return the network interface for what goes between ranks, without sending anything.

    Raises:
        ConfigError, OSError: there is none.
    """
    if hosts.nnodes == 1:
        return LOOPBACK
    assert hosts.rdzv_endpoint is not None
    host, port = split_endpoint(hosts.rdzv_endpoint)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return choose_interface(hosts, probe.getsockname()[0])


def _reach_all(request: DoctorRequest) -> Iterator[Finding]:
    """Connect to each of the hosts that were named, to all at once."""
    pool = ThreadPoolExecutor(len(request.hosts))
    timeout_s = request.left_s(_REACH_S)
    tries = [pool.submit(_reach, host, port, timeout_s) for host, port in request.hosts]
    end_s = time.monotonic() + timeout_s
    for (host, port), attempt in zip(request.hosts, tries, strict=True):
        name = f"host {host}:{port}"
        try:
            seconds, own_address = attempt.result(max(0.0, end_s - time.monotonic()))
            yield ok(name, f"connected from {own_address} in {seconds * 1e3:.1f} ms", seconds=seconds)
        except socket.gaierror as error:
            yield bad(
                name, f"the name is not known: {error.strerror}", "correct it, or add it to /etc/hosts or DNS"
            )
        except TimeoutError:
            yield bad(name, f"no answer in {timeout_s:.1f} s", _FIREWALL)
        except OSError as error:
            yield bad(name, f"cannot be reached: {error.strerror}", _FIREWALL)


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
