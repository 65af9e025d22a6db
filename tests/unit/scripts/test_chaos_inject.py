"""An injected error that a library drops comes again, until the program that is being hurt has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_LONG = "for _ in range(10**9): pass"
_DROPPED_BY_EXCEPT = f"""
import os, signal
try:
    os.kill(os.getpid(), signal.SIGRTMIN + 1)
except Exception:
    print("dropped", flush=True)
{_LONG}
"""
_DROPPED_BY_A_CALLBACK = f"""
import os, signal
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGRTMIN + 1)
dropped = Dropped()
del dropped
print("dropped", flush=True)
{_LONG}
"""
# Code of the project imports the library: what is compiled here says that it is one of its files.
_PROGRAM = """
import functools, signal, sys
import sitecustomize as chaos
for number, fault in enumerate(chaos.BY_SIGNAL, signal.SIGRTMIN):
    signal.signal(number, functools.partial(chaos.hurt, fault))
try:
    exec(compile("import library", sys.argv[1], "exec"))
except MemoryError as error:
    print("came through:", error)
"""


@pytest.mark.parametrize("library", [_DROPPED_BY_EXCEPT, _DROPPED_BY_A_CALLBACK], ids=["except", "callback"])
def test_an_error_that_a_library_drops_comes_again(tmp_path: Path, library: str) -> None:
    (tmp_path / "library.py").write_text(library)
    path = f"{_ROOT / 'scripts' / 'chaos_inject'}:{tmp_path}"
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(_ROOT / "tprt" / "some.py")],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=30.0,
        check=True,
    )
    assert run.stdout == "dropped\ncame through: injected by chaos\n"
