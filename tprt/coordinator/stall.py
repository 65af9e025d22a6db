"""Says in words who waits for whom when no rank moves on, from the heartbeats and the states of processes.

All ranks run the same code and call the same collectives in the same order, so their records can be compared:
who is behind is waited for, and who is ahead of a collective in which others wait has skipped it. A pure
function of what it is given; `stall_probe` collects that. The records are those of the CPU: on a GPU a rank is
out of a collective once that is queued. Knows nothing of steps beyond their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tprt.transport.heartbeat import AFTER_LAYERS, BEFORE_LAYERS, NO_STEP, Phase, RankBeat
from tprt.transport.peer_process import is_gone, is_stopped, state_words

_BEHIND_ALL_LAYERS = 1 << 30


@dataclass(frozen=True, slots=True)
class StallReport:
    """Which rank holds up the others (None: none in particular), in words, and its Python stacks ("": none)."""

    rank: int | None
    text: str
    stack: str = ""

    def __str__(self) -> str:
        """The stack first, so that the last line holds the gist."""
        return f"{self.stack.rstrip()}\n{self.text}" if self.stack else self.text


@dataclass(frozen=True, slots=True)
class GroupView:
    """What is known of a group at one moment.

    Attributes:
        beats: the record of each rank, in rank order.
        states: the state letter of each rank's process, see `process_state`; "" for one that is gone.
        now_ns: monotonic nanoseconds of this moment.
        since_ns: when the ranks were told to do what they have not done.
        step: the step that they were told to run; None: to get ready.
        host: where those run that are on this host.
    """

    beats: Sequence[RankBeat]
    states: Sequence[str]
    now_ns: int
    since_ns: int = 0
    step: int | None = None
    host: str = "localhost"


def is_stalled(beats: Sequence[RankBeat], now_ns: int, timeout_s: float, since_ns: int = 0) -> bool:
    """Whether no rank has given a sign for `timeout_s`; ask while a step is in flight, since `since_ns`.

    A rank that computes long shows layer after layer, and one that loads shows bytes: that is no stall.
    """
    return now_ns - _last_sign_ns(beats, since_ns) > timeout_s * 1e9


def describe_stall(view: GroupView) -> StallReport:
    """Say who holds up the group, where that rank was last seen, and what the others do."""
    blamed, why = _blame(view)
    others = [beat for beat in view.beats if beat not in blamed]
    clauses = [*_what_they_do(others), *(_accuse(view, beat, others, why) for beat in blamed)]
    if not blamed:
        clauses[-1] += f": {why}"
    rank = blamed[0].rank if blamed else None
    return StallReport(rank, f"{_headline(view)}: {'; '.join(clauses)}")


# Who is to blame.


def _blame(view: GroupView) -> tuple[list[RankBeat], str]:
    """Return who holds up the others, and a remark on it; nobody when all are at the same place."""
    beats = list(view.beats)
    if dead := [beat for beat in beats if beat.pid and is_gone(view.states[beat.rank])]:
        return dead, ""
    if stopped := [beat for beat in beats if beat.pid and is_stopped(view.states[beat.rank])]:
        return stopped, ""
    if any(beat.phase < Phase.IDLE for beat in beats):
        if skipped := [beat for beat in beats if any(_has_skipped_in_start(beat, other) for other in beats)]:
            return skipped, "it skipped a collective"
        first = min(map(_start_place, beats))
        late = [beat for beat in beats if _start_place(beat) == first]
        return (late, "") if len(late) < len(beats) else ([], "none of them has gone further")
    if view.step is not None and (deaf := [beat for beat in beats if beat.step < view.step]):
        return (deaf, "") if len(deaf) < len(beats) else ([], f"step {view.step} has not reached them")
    return _blame_in_step(beats)


def _blame_in_step(beats: list[RankBeat]) -> tuple[list[RankBeat], str]:
    """The same, for ranks that all live, are ready, and have received the step."""
    if skipped := [beat for beat in beats if any(_has_skipped(beat, other) for other in beats)]:
        return skipped, "it skipped a collective"
    first = min(map(_count_place, beats))
    behind = [beat for beat in beats if _count_place(beat) == first]
    ahead = [beat for beat in beats if beat not in behind]
    if not ahead:
        return [], _remark_on_equals(beats)
    # Those behind wait for someone to come, and those ahead came before: who are fewer are taken for wrong.
    if all(beat.inside for beat in behind) and len(ahead) <= len(behind):
        where = _collective(behind[0])
        return ahead, f"it skipped a collective, or {_names(behind)} {_verb(behind, 'hang')} in {where}"
    return behind, ""


def _remark_on_equals(beats: Sequence[RankBeat]) -> str:
    if all(beat.inside for beat in beats):
        return "all have entered it, so the collective itself hangs"
    if all(beat.phase == Phase.IDLE for beat in beats):
        return "every rank has finished, but the answer of rank 0 has not come"
    return "none is behind the others"


def _has_skipped(beat: RankBeat, other: RankBeat) -> bool:
    """Whether `other` waits in a collective that `beat` has never entered although it is further on."""
    is_further = _code_place(beat) > _code_place(other)
    return other.inside and is_further and _count_place(beat) <= _count_place(other)


def _has_skipped_in_start(beat: RankBeat, other: RankBeat) -> bool:
    """Whether `beat` is ready, or further on, though it never entered a collective that `other` waits in."""
    return other.inside and beat.phase > other.phase and beat.collective < other.collective


def _code_place(beat: RankBeat) -> tuple[int, bool, int]:
    """How far a rank is in the code of its steps."""
    layer = _BEHIND_ALL_LAYERS if beat.layer == AFTER_LAYERS else beat.layer
    return beat.step, beat.phase == Phase.IDLE, layer


def _count_place(beat: RankBeat) -> tuple[int, bool, bool]:
    """How far a rank is by the collectives that it has called."""
    return beat.collective, not beat.inside, beat.phase == Phase.IDLE


def _start_place(beat: RankBeat) -> tuple[int, int, bool]:
    """How far a rank is on its way to its first step."""
    return min(beat.phase, Phase.IDLE), beat.collective, not beat.inside


# Words.


def _headline(view: GroupView) -> str:
    seconds = (view.now_ns - _last_sign_ns(view.beats, view.since_ns)) / 1e9
    return f"{_subject(view)} made no progress for {seconds:.1f} s"


def _subject(view: GroupView) -> str:
    if any(beat.phase < Phase.IDLE for beat in view.beats):
        return "the start"
    step = max(beat.step for beat in view.beats) if view.step is None else view.step
    if step == NO_STEP:
        return "the group"
    kinds = [b.phase.words for b in view.beats if b.step == step and b.phase in (Phase.PREFILL, Phase.DECODE)]
    return f"step {step} ({kinds[0]})" if kinds else f"step {step}"


def _what_they_do(beats: Sequence[RankBeat]) -> list[str]:
    """Return a clause for each group of ranks that do the same."""
    groups: dict[tuple[bool, str], list[RankBeat]] = {}
    for beat in beats:
        groups.setdefault((beat.inside, _collective(beat) if beat.inside else _where(beat)), []).append(beat)
    return [
        f"{_names(group)} {_verb(group, 'wait')} in {what}"
        if inside
        else f"{_names(group)} {'is' if len(group) == 1 else 'are'} {what}"
        for (inside, what), group in groups.items()
    ]


def _accuse(view: GroupView, beat: RankBeat, others: Sequence[RankBeat], why: str) -> str:
    """Return the clause on a rank that holds up `others`."""
    if not beat.pid:
        return (
            f"rank {beat.rank} (host {_host(view, beat)}) has not begun: its process has given no sign of life"
        )
    state = state_words(view.states[beat.rank])
    age_s = max(0.0, (view.now_ns - beat.time_ns) / 1e9)
    name = f"rank {beat.rank} (host {_host(view, beat)}, pid {beat.pid})"
    remark = f"; {why}" if why else ""
    offence = _offence(view, beat, others)
    return f"{name} {offence}: last seen {_where(beat)}, {age_s:.1f} s ago; its process {state}{remark}"


def _host(view: GroupView, beat: RankBeat) -> str:
    return f"of node rank {beat.host}" if beat.host else view.host


def _offence(view: GroupView, beat: RankBeat, others: Sequence[RankBeat]) -> str:
    """Say what a rank has not done that `others` have."""
    if view.step is not None and beat.phase == Phase.IDLE and beat.step < view.step:
        return f"has not received step {view.step}"
    awaited = {(other.collective, other.kind) for other in others if other.inside}
    if len(awaited) != 1:
        return "does not go on"
    number, kind = awaited.pop()
    if (beat.collective, beat.kind) == (number, kind):
        return "is in it as well" if beat.inside else "has left it"
    if beat.collective > number:
        return "is ahead"
    return "has not entered it"


def _where(beat: RankBeat) -> str:
    """Return where a rank is, as in "last seen ..."."""
    if beat.phase == Phase.IDLE:
        return "idle before the first step" if beat.step == NO_STEP else f"idle after step {beat.step}"
    if beat.phase not in (Phase.PREFILL, Phase.DECODE):
        inside = f" in {_collective(beat)}" if beat.inside else ""
        return f"in {beat.phase.words}{inside}{_progress(beat)}"
    layer = {BEFORE_LAYERS: "before the layers", AFTER_LAYERS: "after the layers"}
    place = layer.get(beat.layer, f"in layer {beat.layer}")
    if beat.inside:
        return f"{place} in {_collective(beat)}"
    return f"{place} after {_collective(beat)}" if beat.collective else f"{place} before any collective"


def _progress(beat: RankBeat) -> str:
    if beat.phase != Phase.LOAD or not beat.total_bytes:
        return ""
    return f" ({beat.done_bytes / 2**20:,.1f} of {beat.total_bytes / 2**20:,.1f} MiB)"


def _collective(beat: RankBeat) -> str:
    return f"{beat.kind} {beat.collective}"


def _names(beats: Sequence[RankBeat]) -> str:
    *most, last = (str(beat.rank) for beat in beats)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _verb(beats: Sequence[RankBeat], verb: str) -> str:
    return f"{verb}s" if len(beats) == 1 else verb


def _last_sign_ns(beats: Sequence[RankBeat], since_ns: int) -> int:
    return max(since_ns, *(beat.time_ns for beat in beats))
