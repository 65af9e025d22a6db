"""`tprt doctor`: whether this machine can run a deployment, as a table with a fix a line, or as JSON."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.config_file import load_config
from launch.doctor.examine import examine
from launch.doctor.finding import Finding, Verdict, worst
from launch.doctor.request import DoctorRequest, parse_host
from launch.options import ConfigArgument, JsonOption, SetOption
from launch.program_end import ProgramEnd

EXIT_BAD = 1
# What it takes to end what hangs and to show the result: on an idle machine, and at most.
_TO_SHOW_S, _TO_SHOW_MOST_S = 0.8, 1.8
_COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.BAD: "bold red", Verdict.SKIPPED: "dim"}


def doctor(
    config: ConfigArgument,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST:PORT", help="Another host that must be reached; repeatable."),
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option(min=3.0, max=3600.0, help="Seconds in which all is over; what has not answered is named."),
    ] = 10.0,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Try out what a deployment needs of this machine, before anything is loaded, within ten seconds.

    Exit code: 0 when nothing is bad (there may be warnings), 1 when something is, 2 for bad settings.
    """
    age_s = _age_s()
    began_s = time.monotonic() - age_s
    # Where others want the CPUs as well, all takes longer than it should: so far by this factor.
    to_show_s = min(_TO_SHOW_MOST_S, _TO_SHOW_S * max(1.0, age_s / time.process_time()))
    settings = load_config(config, set_ or ())
    hosts = tuple(parse_host(text) for text in host or ())
    # SIGTERM leaves as Ctrl-C does, with everything ended.
    end = ProgramEnd(lambda: None)
    end.guard()
    findings = examine(DoctorRequest(settings, hosts, began_s + timeout_s - to_show_s))
    end.release()
    seconds = round(time.monotonic() - began_s, 1)
    if as_json:
        rows = [finding.to_fields() for finding in findings]
        print(json.dumps({"verdict": worst(findings), "seconds": seconds, "findings": rows}))
    else:
        _print(findings, seconds)
    if worst(findings) is Verdict.BAD:
        raise typer.Exit(EXIT_BAD)


def _age_s() -> float:
    """Return how long this process has been running."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def _print(findings: Sequence[Finding], seconds: float) -> None:
    """Print a line for each finding, with its fix below it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.fix:
            text.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(Text(finding.check), Text(finding.verdict, style=_COLOURS[finding.verdict]), text)
    console = Console(highlight=False)
    console.print(table)
    counts = Counter(finding.verdict for finding in findings)
    console.print(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict) + f", in {seconds} s")
