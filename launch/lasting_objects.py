"""Keeps garbage collections away from what stays as long as the process. Knows nothing of what that is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_objects() -> Iterator[None]:
    """Make objects that stay, such as modules: no garbage collection looks at them, meanwhile or later.

    A tenth of the time of importing torch is collections that find nothing, and with its objects each full one
    takes a tenth of a second, in the middle of a step. What is there already stays, too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
