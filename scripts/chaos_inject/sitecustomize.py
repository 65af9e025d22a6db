"""Hurts one process of a deployment at one moment, as scripts/chaos.py tells it by the environment.

Python imports this by itself where its folder comes first on PYTHONPATH, so the deployment needs no hook of its
own. TPRT_CHAOS holds JSON:

    notes   folder for the files below
    at      process that acts ("rank 1", "coordinator"), in epoch 0
    phase   where it acts, in the words of the heartbeats
    does    the name of a fault, or "pause": it notes `reached` and waits for `go`
    python  interpreter for children that the client starts

A process notes `fault` just before it hurts itself, and `pid-NAME` once it can be told to from outside: signals
34, 35, ... stand for the faults that a signal cannot be. Knows nothing of what should come of it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

PLAN = "TPRT_CHAOS"
EXIT_CODE = 7
MESSAGE = "injected by chaos"
PAUSE = "pause"
SKIP = "skipped collective"
# The signals that stand for a fault, for `signal.SIGRTMIN` on.
BY_SIGNAL = ("exception", "MemoryError", "os._exit")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_OURS = (os.path.join(_ROOT, "tprt", ""), os.path.join(_ROOT, "launch", ""))
_IMPORTLIB = "<frozen importlib._bootstrap>"
_ERRORS: dict[str, type[Exception]] = {"exception": RuntimeError, "MemoryError": MemoryError}
_AGAIN_S = 0.002
_PAUSE_S = 10.0
# In the middle of a step: after collectives that went well.
_COLLECTIVE_OF_STEP = 2
_STEP_OF_PHASE = {"prefill": 1, "decode": 3}


class RaisedInImport:
    """Rides on an error; asks for the fault again where a library drops the error and its import goes on.

    Many a library imports others under `except Exception`, and nothing can be raised out of a weakref callback.
    A lack of memory would show again there. Errors that code of this project handles are left alone.
    """

    def __init__(self, fault: str, struck: FrameType | None) -> None:
        self._fault = fault
        self._import: FrameType | None = None
        for frame in _stack(struck):
            if frame.f_code.co_filename.startswith(_OURS):
                break
            if frame.f_code.co_filename == _IMPORTLIB:
                self._import = frame

    def __del__(self) -> None:
        if self._import is not None and any(frame is self._import for frame in _stack(sys._getframe())):
            # Not at once: whatever is raised in this method is dropped as well.
            signal.signal(signal.SIGALRM, functools.partial(hurt, self._fault))
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def hurt(fault: str, _number: int = 0, struck: FrameType | None = None) -> None:
    """Do to this process what `fault` says; handles a signal that came while `struck` was running."""
    if fault in _ERRORS:
        raise _make_error(fault, struck)
    if fault == "os._exit":
        os._exit(EXIT_CODE)
    os.kill(os.getpid(), signal.Signals[fault])


def _make_error(fault: str, struck: FrameType | None) -> Exception:
    # Here, for an error that a local variable of its traceback refers to is not gone when it is dropped.
    error = _ERRORS[fault](MESSAGE)
    error.rider = RaisedInImport(fault, struck)  # type: ignore[attr-defined]
    return error


class Injector:
    """What one process does at its moment."""

    def __init__(self, plan: dict[str, Any], name: str) -> None:
        self._plan = plan
        self._name = name
        self._is_done = plan["at"] != name
        self._phase = ""
        self._num_steps = 0
        self._num_collectives = 0

    def answer_signals(self) -> None:
        """From now on the faults that a signal cannot be can be asked for by one."""
        for number, fault in enumerate(BY_SIGNAL, signal.SIGRTMIN):
            signal.signal(number, functools.partial(hurt, fault))
        self._note(f"pid-{self._name.replace(' ', '-')}", str(os.getpid()))

    def enter_phase(self, phase: str) -> None:
        """Act if this is the phase, unless that has steps."""
        self._phase = phase
        self._num_collectives = 0
        if phase in _STEP_OF_PHASE:
            self._num_steps += phase == self._plan["phase"]
        elif phase == self._plan["phase"] and phase != "idle":
            self._act()

    def enter_collective(self) -> None:
        """Act if this is the collective of the step of the phase."""
        if self._is_moment():
            self._act()

    def skips(self) -> bool:
        """Tell whether the collective that is about to begin is left out."""
        if self._plan["does"] != SKIP or self._is_done or self._phase != self._plan["phase"]:
            return False
        self._num_collectives += 1
        if self._phase in _STEP_OF_PHASE and not self._is_step():
            return False
        self._is_done = True
        self._note("fault", "")
        return True

    def _is_step(self) -> bool:
        wanted = (_STEP_OF_PHASE[self._phase], _COLLECTIVE_OF_STEP)
        return (self._num_steps, self._num_collectives) == wanted

    def _is_moment(self) -> bool:
        if self._phase != self._plan["phase"] or self._phase not in _STEP_OF_PHASE:
            return False
        if self._plan["does"] == SKIP:
            return False
        self._num_collectives += 1
        return self._is_step()

    def _act(self) -> None:
        if self._is_done or self._plan["does"] == SKIP:
            return
        self._is_done = True
        if self._plan["does"] == PAUSE:
            self._note("reached", "")
            self._wait_for_go()
        else:
            self._note("fault", "")
            hurt(self._plan["does"])

    def _wait_for_go(self) -> None:
        deadline_s = time.monotonic() + _PAUSE_S
        while not os.path.exists(os.path.join(self._plan["notes"], "go")) and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def _note(self, name: str, text: str) -> None:
        path = os.path.join(self._plan["notes"], name)
        with open(f"{path}.draft", "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(f"{path}.draft", path)


class Hooks(importlib.abc.MetaPathFinder):
    """Sees modules being imported, and changes those that mark the phases."""

    def __init__(self, injector: Injector) -> None:
        self._injector = injector
        self._hooks: dict[str, Callable[[ModuleType], None]] = {
            "tprt.transport.heartbeat": self._hook_heartbeat,
            "tprt.distributed.tp_group": self._hook_group,
            "tprt.coordinator.worker_group": self._hook_worker_group,
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module that is changed once it is there; None for all others."""
        if fullname == "torch":
            self._injector.enter_phase("import")
        hook = self._hooks.pop(fullname, None)
        if hook is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_hook(module: ModuleType) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = execute_and_hook  # type: ignore[method-assign]
        return spec

    def _hook_heartbeat(self, module: ModuleType) -> None:
        injector, writer = self._injector, module.HeartbeatWriter
        set_phase, enter_collective = writer.set_phase, writer.enter_collective

        def set_phase_and_act(self: Any, phase: Any) -> None:
            set_phase(self, phase)
            # The phase of the import begins before there is anything to import.
            if phase.words != "import":
                injector.enter_phase(phase.words)

        def enter_collective_and_act(self: Any, number: int, name: str) -> None:
            enter_collective(self, number, name)
            injector.enter_collective()

        writer.set_phase, writer.enter_collective = set_phase_and_act, enter_collective_and_act

    def _hook_group(self, module: ModuleType) -> None:
        injector, group = self._injector, module.TPGroup
        all_reduce, min_int = group.all_reduce, group.min_int
        group.all_reduce = lambda self, tensor: tensor if injector.skips() else all_reduce(self, tensor)
        group.min_int = lambda self, value: value if injector.skips() else min_int(self, value)

    def _hook_worker_group(self, module: ModuleType) -> None:
        injector, group = self._injector, module.WorkerGroup
        shut_down = group.shut_down

        def act_and_shut_down(self: Any, reason: str) -> None:
            injector.enter_phase("shutdown")
            shut_down(self, reason)

        group.shut_down = act_and_shut_down


def who_am_i(env: os._Environ[str]) -> str:
    """Return the name of this process in messages, "" for one that is left alone."""
    if "RANK" in env:
        return f"rank {env['RANK']}" if env.get("TPRT_EPOCH") == "0" else ""
    return "coordinator" if "TPRT_SUPERVISOR_FD" in env else "supervisor"


def install() -> None:
    """Prepare this process for its part."""
    plan = json.loads(os.environ[PLAN])
    name = who_am_i(os.environ)
    if not name:
        return
    if name == "supervisor":
        sys.executable = plan["python"]
    injector = Injector(plan, name)
    injector.answer_signals()
    sys.meta_path.insert(0, Hooks(injector))


if PLAN in os.environ:
    install()
