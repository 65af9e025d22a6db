"""How far the clock of a host that joins is from that of node rank 0, which its log lines are read beside."""

from __future__ import annotations

import time

# A hello is on its way, and waits to be read, for less.
_TOLERATED_S = 2.0


def clock_s() -> float:
    """Return what this host's clock says, in Unix seconds."""
    return time.time()


def skew_words(theirs_s: float, own_s: float) -> str:
    """Return what to say of a host whose clock said `theirs_s` when this one's said `own_s`; "" if nothing."""
    ahead_s = theirs_s - own_s
    if abs(ahead_s) <= _TOLERATED_S:
        return ""
    direction = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"its clock is {abs(ahead_s):.1f} s {direction} this host's, and so are the times in its log; keep the"
        " clocks of all hosts right (chrony or another NTP client)"
    )
