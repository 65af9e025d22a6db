"""Whether the engine makes progress, as its client sees it.

Progress is a step that has ended, a token, an answer, or a rank that has come further within a long step. Reads
no clock; knows nothing of lanes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSigns:
    """What is known of the engine at one moment; times are seconds of the monotonic clock.

    Attributes:
        now_s: that moment.
        is_dead: it has ended.
        is_ready: all ranks were ready once.
        is_replacing: ranks have failed, and new ones start.
        waiting_since_s: since when the oldest request, or question, waits for its end; None when none does.
        progress_s: when the last step, token or answer came.
        beat_s: when a rank has last shown a sign of life; 0 when unknown.
    """

    now_s: float
    is_dead: bool
    is_ready: bool
    is_replacing: bool
    waiting_since_s: float | None
    progress_s: float
    beat_s: float


def judge(signs: EngineSigns, stall_timeout_s: float) -> tuple[bool, str]:
    """Tell whether the engine is well, and why, in words that give nothing of the host away.

    Args:
        signs: what is known.
        stall_timeout_s: work without progress for longer than this is a stall.
    """
    if signs.is_dead:
        return False, "the engine has ended; the server's log says of what"
    if not signs.is_ready:
        return True, "the ranks are not ready yet"
    if signs.waiting_since_s is None:
        return True, "nothing to do"
    still_s = signs.now_s - max(signs.waiting_since_s, signs.progress_s, signs.beat_s)
    if still_s > stall_timeout_s:
        return False, f"no progress for {still_s:.0f} s; expected some every {stall_timeout_s:g} s"
    if signs.is_replacing:
        return True, "the ranks are being replaced; requests go on afterwards"
    return True, "steps are finished as they come"
