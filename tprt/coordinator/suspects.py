"""Which requests may be what kills the ranks, and which of them did.

A worker group that dies in a step may have died of any request in it. One that was in the last step of two
epochs is a suspect: it runs alone until it has survived that, or died. Nothing is done about a request that
was in one such step, and one that has gone on for a while since is forgotten: a request that kills does so
again at the same point, since it is computed again from there.

A death by a signal from outside (a person, another program) proves less than one by an error. It must happen to
a request twice while it is alone, and a single token in between shows that it was not the request's doing.

Pure: knows nothing of processes, steps and clients.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field

# Deaths in company that make a suspect.
_DEATHS_OF_A_SUSPECT = 2
# Tokens that clear a suspect that is alone: one after its prefill, one after a decode.
_CLEARING_TOKENS_ALONE = 2
# Tokens after which a death in company counts no more.
_CLEARING_TOKENS = 8
_CLEARING_TOKENS_AFTER_SIGNALS = 1
_DEATHS_ALONE_BY_SIGNAL = 2


@dataclass(slots=True)
class _Record:
    """What speaks against one request.

    Attributes:
        epochs: the worker groups that died in a step with it.
        num_tokens: its tokens since the last of them.
        num_deaths_alone: how many of those steps had nobody else in them, while it was a suspect.
        by_signal_only: nothing but signals from outside has ended those epochs.
    """

    epochs: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_deaths_alone: int = 0
    by_signal_only: bool = True

    @property
    def is_suspect(self) -> bool:
        return len(self.epochs) >= _DEATHS_OF_A_SUSPECT

    @property
    def is_cleared(self) -> bool:
        if self.by_signal_only:
            return self.num_tokens >= _CLEARING_TOKENS_AFTER_SIGNALS
        return self.num_tokens >= (_CLEARING_TOKENS_ALONE if self.is_suspect else _CLEARING_TOKENS)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request that kills, and the epochs that died of it."""

    key: Hashable
    epochs: tuple[int, ...]


class Suspects:
    """All requests that something speaks against."""

    def __init__(self) -> None:
        self._records: dict[Hashable, _Record] = {}

    def __bool__(self) -> bool:
        return bool(self._records)

    def to_isolate(self) -> list[Hashable]:
        """Return the requests that must run alone, in the order in which they came under suspicion."""
        return [key for key, record in self._records.items() if record.is_suspect]

    def keep_only(self, unfinished: Collection[Hashable]) -> None:
        """Forget the requests that have ended."""
        self._records = {key: record for key, record in self._records.items() if key in unfinished}

    def was_alone(self, keys: Collection[Hashable]) -> bool:
        """Tell whether a step with these requests was the trial of a suspect."""
        return len(keys) == 1 and all(self._is_suspect(key) for key in keys)

    def step_died(self, epoch: int, keys: Collection[Hashable], is_from_outside: bool) -> Verdict | None:
        """Note that `epoch` died in a step with `keys`; return the request that is to blame, if one is."""
        alone = self.was_alone(keys)
        for key in keys:
            record = self._records.setdefault(key, _Record())
            record.epochs.append(epoch)
            record.num_tokens = 0
            record.num_deaths_alone += alone
            record.by_signal_only &= is_from_outside
        if not alone:
            return None
        (key,) = keys
        record = self._records[key]
        if is_from_outside and record.num_deaths_alone < _DEATHS_ALONE_BY_SIGNAL:
            return None
        del self._records[key]
        return Verdict(key, tuple(record.epochs))

    def got_tokens(self, keys: Iterable[Hashable]) -> bool:
        """Note that each of `keys` has a new token; tell whether any was cleared by it."""
        cleared = False
        for key in keys:
            record = self._records.get(key)
            if record is None:
                continue
            record.num_tokens += 1
            if record.is_cleared:
                del self._records[key]
                cleared = True
        return cleared

    def _is_suspect(self, key: Hashable) -> bool:
        return key in self._records and self._records[key].is_suspect
