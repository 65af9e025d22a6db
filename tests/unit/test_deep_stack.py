"""A call on a deep stack is like any other call, with more room."""

from __future__ import annotations

import threading

import pytest

from tprt.deep_stack import call_on_deep_stack


def test_it_returns_and_raises_what_the_call_does_and_leaves_nothing_behind() -> None:
    threads, usual = threading.active_count(), threading.stack_size()
    assert call_on_deep_stack(lambda: threading.current_thread().name).startswith("deep stack")
    with pytest.raises(ZeroDivisionError):
        call_on_deep_stack(lambda: 1 // 0)
    assert threading.active_count() == threads
    assert threading.stack_size() == usual


def test_calls_from_several_threads_leave_the_usual_size_as_it_was() -> None:
    usual, found = threading.stack_size(), []
    callers = [
        threading.Thread(target=lambda n=n: found.append(call_on_deep_stack(lambda: n))) for n in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(found) == list(range(8))
    assert threading.stack_size() == usual
