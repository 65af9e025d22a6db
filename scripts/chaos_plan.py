"""What the processes of a deployment find in their environment, so that one of them is hurt at its moment.

scripts/chaos_inject/sitecustomize.py reads it. Knows nothing of what comes of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from scripts.chaos_matrix import EXIT_CODE, RANKS, Cell, Fault, Victim
from tprt.transport.heartbeat import Phase

_SCRIPTS = Path(__file__).resolve().parent
_PAUSE = "pause"
_WAIT = "i=0; while [ ! -e {notes}/go -a $i -lt 500 ]; do sleep 0.02; i=$((i+1)); done"


def environment(cell: Cell, notes: Path) -> dict[str, str]:
    """Return the variables for `cell`, and write an interpreter into the folder `notes`."""
    interpreter = notes / "python"
    interpreter.write_text(_interpreter(cell, notes), encoding="utf-8")
    interpreter.chmod(0o700)
    plan = {
        "notes": str(notes),
        "at": acts_at(cell),
        "phase": cell.phase.words,
        "does": _PAUSE if is_from_outside(cell) else cell.fault,
        "python": str(interpreter),
    }
    paths = [str(_SCRIPTS / "chaos_inject"), str(_SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    return {"TPRT_CHAOS": json.dumps(plan), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def acts_at(cell: Cell) -> str:
    """Return the process that marks the moment."""
    if cell.victim is Victim.COORDINATOR and cell.phase is Phase.SHUTDOWN:
        return Victim.COORDINATOR
    return cell.victim if cell.victim in RANKS else Victim.RANK_1


def is_from_outside(cell: Cell) -> bool:
    """Tell whether the victim is hurt from outside, while whoever marks the moment waits."""
    return cell.phase is Phase.IDLE or acts_at(cell) != cell.victim


def _interpreter(cell: Cell, notes: Path) -> str:
    """Return a shell script in the place of Python, which may die before Python runs."""
    action = _before_python(cell, notes) if cell.phase is Phase.SPAWN else ""
    return f'#!/bin/sh\n{action}exec {sys.executable} "$@"\n'


def _before_python(cell: Cell, notes: Path) -> str:
    if is_from_outside(cell):
        act = f"touch {notes}/reached; {_WAIT.format(notes=notes)}"
    elif cell.fault is Fault.EXIT:
        act = f"touch {notes}/fault; exit {EXIT_CODE}"
    else:
        act = f"touch {notes}/fault; kill -{cell.fault.removeprefix('SIG')} $$"
    rank = acts_at(cell).removeprefix("rank ")
    return f'if [ "$RANK" = {rank} ] && [ "$TPRT_EPOCH" = 0 ]; then {act}; fi\n'
