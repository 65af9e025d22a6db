"""What is made to stay is left alone by garbage collections, and they go on for all else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from launch.lasting_objects import lasting_objects


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_of_a_test_stays() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.collect()
    # All modules and tests again, as tests/conftest.py has it.
    gc.freeze()


def test_no_collection_runs_meanwhile_or_looks_at_it_later() -> None:
    with lasting_objects():
        assert not gc.isenabled()
        ring = Ring()
        lasting = weakref.ref(ring)
        del ring
    gc.collect()
    assert lasting() is not None


def test_collections_go_on_for_what_is_made_later_also_after_an_error() -> None:
    with pytest.raises(ImportError), lasting_objects():
        raise ImportError("no such module")
    assert gc.isenabled()
    ring = Ring()
    passing = weakref.ref(ring)
    del ring
    gc.collect()
    assert passing() is None
