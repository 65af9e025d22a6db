"""Kernels that are rehearsed are compiled side by side, once each, while a rank does something else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tprt import kernels
from tprt.worker.compiling import compiling_kernels

WAIT_S = 20.0
LIKE = torch.zeros(1)


class FakeTriton:
    """As much of Triton as is asked: a hook that may keep a kernel from being compiled and run."""

    def __init__(self) -> None:
        self.knobs = SimpleNamespace(runtime=SimpleNamespace(jit_cache_hook=None))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        triton, runtime, cache = ModuleType("triton"), ModuleType("triton.runtime"), ModuleType("cache")
        triton.knobs, cache.triton_key = self.knobs, lambda: "key"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
        monkeypatch.setitem(sys.modules, "triton.runtime.cache", cache)
        monkeypatch.delitem(sys.modules, "tprt.kernels.compile_ahead", raising=False)
        monkeypatch.setattr(kernels, "can_use", lambda tensor: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


class FakeKernel:
    """A kernel's function, which is compiled for each key that it is launched with."""

    def __init__(self, triton: FakeTriton, compiling: Callable[[], object] = lambda: None) -> None:
        self._runtime = triton.knobs.runtime
        self._compiling = compiling
        self.there: set[str] = set()
        self.compiled: list[str] = []
        self.loaded: list[str] = []
        self.ran: list[str] = []

    def launch(self, key: str) -> None:
        if key not in self.there:
            hook = self._runtime.jit_cache_hook
            compile = {"specialization_data": f"data of {key}", "key": key}
            names = SimpleNamespace(jit_function=self, name="kernel")
            if hook is not None and hook(key=key, repr="", fn=names, compile=compile, is_manual_warmup=False):
                return
            self.preload(f"data of {key}")
        self.ran.append(key)

    def preload(self, specialization: str) -> Any:
        assert self._runtime.jit_cache_hook is None, "it would keep this from being compiled"
        self._compiling()
        key = specialization.removeprefix("data of ")
        self.compiled.append(key)
        self.there.add(key)
        return _Compiled(lambda: self.loaded.append(key))

    def launching(self, *keys: str) -> Callable[[], None]:
        return lambda: [self.launch(key) for key in keys] and None


class _Compiled:
    def __init__(self, load: Callable[[], None]) -> None:
        self._load = load

    @property
    def run(self) -> object:
        self._load()
        return self


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    fake = FakeTriton()
    fake.install(monkeypatch)
    return fake


def test_where_there_are_no_kernels_nothing_is_rehearsed() -> None:
    done = []
    with compiling_kernels(LIKE, lambda: pytest.fail("there is nothing to compile")):
        done.append("body")
    assert done == ["body"]


def test_what_is_rehearsed_is_compiled_once_loaded_and_not_run(triton: FakeTriton) -> None:
    kernel = FakeKernel(triton)
    with compiling_kernels(LIKE, kernel.launching("a", "b", "a")):
        pass
    assert sorted(kernel.compiled) == sorted(kernel.loaded) == ["a", "b"]
    assert kernel.ran == []
    kernel.launch("a")
    kernel.launch("c")
    assert kernel.ran == ["a", "c"]
    assert kernel.compiled[2:] == ["c"]


def test_a_kernel_that_was_launched_before_runs_in_a_rehearsal(triton: FakeTriton) -> None:
    kernel = FakeKernel(triton)
    kernel.launch("a")
    with compiling_kernels(LIKE, kernel.launching("a")):
        pass
    assert kernel.compiled == ["a"]
    assert kernel.ran == ["a", "a"]


def test_kernels_are_compiled_side_by_side_and_beside_the_body(
    triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    all_are_there = threading.Barrier(3)
    kernel = FakeKernel(triton, lambda: all_are_there.wait(WAIT_S))
    with compiling_kernels(LIKE, kernel.launching("a", "b")):
        all_are_there.wait(WAIT_S)
    assert sorted(kernel.compiled) == ["a", "b"]


def test_a_kernel_that_does_not_compile_fails_the_start_once_the_body_is_done(triton: FakeTriton) -> None:
    def fail() -> None:
        raise ValueError("out of registers")

    kernel, done = FakeKernel(triton, fail), []
    with (
        pytest.raises(ValueError, match="out of registers"),
        compiling_kernels(LIKE, kernel.launching("a")),
    ):
        done.append("body")
    assert done == ["body"]


def test_a_rehearsal_that_fails_leaves_triton_as_it_was(triton: FakeTriton) -> None:
    kernel = FakeKernel(triton)

    def rehearse() -> None:
        kernel.launch("a")
        raise RuntimeError("no such step")

    with pytest.raises(RuntimeError, match="no such step"), compiling_kernels(LIKE, rehearse):
        pytest.fail("the body runs after the rehearsal")
    assert kernel.compiled == []
    kernel.launch("a")
    assert kernel.ran == ["a"]


def test_a_body_that_fails_is_not_held_up_by_kernels(
    triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    begun, may_end = threading.Event(), threading.Event()

    def compile_for_long() -> None:
        begun.set()
        assert may_end.wait(WAIT_S)

    kernel = FakeKernel(triton, compile_for_long)

    def load_nothing() -> None:
        assert begun.wait(WAIT_S)
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), compiling_kernels(LIKE, kernel.launching("a", "b")):
        load_nothing()
    may_end.set()
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join(WAIT_S)
    # The one that had begun; the other was given up.
    assert kernel.compiled == ["a"]
