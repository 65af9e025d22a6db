"""A program with something to clean up cleans up however it ends, and handles its own signals if it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launch.program_end import ProgramEnd

PROGRAM = """
import os, signal, sys
from launch.program_end import ProgramEnd
# Whoever runs the tests may ignore signals (nohup, a shell's background): a child inherits that.
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
guard = ProgramEnd(lambda: print("cleaned up", flush=True))
"""


def run(lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + lines], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("last_words", "exit_code"),
    [
        ("", 0),
        ("raise ValueError", 1),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("os.kill(os.getpid(), signal.SIGHUP)", 129),
    ],
)
def test_it_cleans_up_once_however_the_program_ends(last_words: str, exit_code: int) -> None:
    ran = run(f"guard.guard()\n{last_words}")
    assert (ran.stdout, ran.returncode) == ("cleaned up\n", exit_code)


def test_a_forked_copy_leaves_the_cleaning_to_the_original() -> None:
    ran = run("guard.guard()\nif os.fork() == 0:\n    sys.exit()\nos.wait()\nprint('waited', flush=True)")
    assert ran.stdout == "waited\ncleaned up\n"


def test_what_is_released_is_not_cleaned_up_and_the_signal_kills_again() -> None:
    ran = run("guard.guard()\nguard.release()\nguard.release()\nos.kill(os.getpid(), signal.SIGTERM)")
    assert (ran.stdout, ran.returncode) == ("", -signal.SIGTERM)


def test_signals_stay_in_hand_until_the_last_guard_is_released() -> None:
    found = signal.getsignal(signal.SIGTERM)
    assert found == signal.SIG_DFL
    first, second = ProgramEnd(lambda: None), ProgramEnd(lambda: None)
    first.guard()
    second.guard()
    first.release()
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    second.release()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == found


def test_a_program_that_handles_or_ignores_a_signal_keeps_its_way() -> None:
    ran = run(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))\n"
        "guard.guard()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nos.kill(os.getpid(), signal.SIGTERM)\nguard.release()"
    )
    assert (ran.stdout, ran.returncode) == ("mine\n", 0)


PUT_OFF = """
from launch.program_end import PutOffEnd
guard.guard()
with PutOffEnd() as end:
    os.kill(os.getpid(), signal.{first})
    print("asked", end.is_asked, flush=True)
    {then}
    end.catch_up()
print("went on")
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_that_is_put_off_acts_once_it_is_caught_up_with(name: str, exit_code: int) -> None:
    ran = run(PUT_OFF.format(first=name, then="print('shown', flush=True)"))
    assert (ran.stdout, ran.returncode) == ("asked True\nshown\ncleaned up\n", exit_code)


def test_ctrl_c_that_is_put_off_is_still_ctrl_c() -> None:
    ran = run(PUT_OFF.format(first="SIGINT", then="print('shown', flush=True)"))
    assert ran.stdout == "asked True\nshown\ncleaned up\n"
    assert "KeyboardInterrupt" in ran.stderr


def test_a_second_signal_is_not_put_off() -> None:
    then = "os.kill(os.getpid(), signal.SIGTERM); print('shown')"
    ran = run(PUT_OFF.format(first="SIGINT", then=then))
    assert (ran.stdout, ran.returncode) == ("asked True\ncleaned up\n", 143)


def test_without_a_signal_nothing_happens() -> None:
    ran = run(
        "from launch.program_end import PutOffEnd\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "with PutOffEnd() as end:\n    end.catch_up()\n"
        "print(end.is_asked, signal.getsignal(signal.SIGINT) is before)"
    )
    assert ran.stdout == "False True\n"
