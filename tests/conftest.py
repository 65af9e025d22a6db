"""Skips what this machine has no devices for, and lets garbage collections pass over what stays anyway."""

from __future__ import annotations

import gc

import pytest

_DEVICES_NEEDED = {"gpu": 1, "multigpu": 2}


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Import all tests and what they need without garbage collections: they would find next to nothing."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Keep all modules and tests out of garbage collections: with them, one takes a third of a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = [
        (item, need)
        for item in items
        for mark, need in _DEVICES_NEEDED.items()
        if item.get_closest_marker(mark)
    ]
    if not wanted:
        return
    import torch

    found = torch.cuda.device_count()
    for item, need in wanted:
        if found < need:
            item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA devices, found {found}"))
