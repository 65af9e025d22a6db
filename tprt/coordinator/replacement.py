"""Whether a worker group that has failed is replaced, what that costs, and which request is to blame.

Knows nothing of clients and lanes to ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

from tprt.config import SupervisionConfig
from tprt.coordinator.cause import Cause, CauseKind, first_cause
from tprt.coordinator.group_keeper import GroupKeeper
from tprt.coordinator.restart_budget import RestartBudget
from tprt.coordinator.suspects import Suspects
from tprt.errors import EngineDeadError, TransportError
from tprt.log import get_logger
from tprt.messages import GroupEnded

_LOG = get_logger(__name__)
# The supervisor gathers causes for a moment, kills, and waits until the kernel has taken everything apart.
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class Guilty:
    """A request that is failed because it kills ranks; `message` is for its client."""

    key: Hashable
    message: str


def cause_of_end(ended: GroupEnded) -> Cause:
    """Return what the supervisor says about the end of a group."""
    return Cause(
        CauseKind(ended.kind),
        ended.cause,
        is_input_error=ended.is_input_error,
        is_from_outside=ended.is_from_outside,
    )


class Replacement:
    """The policy of one engine, over all its worker groups."""

    def __init__(
        self,
        keeper: GroupKeeper | None,
        supervision: SupervisionConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Assign; without a `keeper` no group is ever replaced."""
        self._keeper = keeper
        self._supervision = supervision
        self._clock = clock
        self._suspects = Suspects()
        self._budget = RestartBudget(supervision.max_restarts, supervision.restart_window_s)

    def to_isolate(self) -> list[Hashable]:
        """Return the requests that must run alone."""
        return self._suspects.to_isolate()

    def step_finished(self, keys: Callable[[], Collection[Hashable]]) -> bool:
        """Note that a step brought a token for each of `keys()`; tell whether fewer must run alone now."""
        self._budget.step_finished()
        return bool(self._suspects) and self._suspects.got_tokens(keys())

    def settle(self, epoch: int, noticed: Cause) -> Cause:
        """Have the ranks of `epoch` ended, wait until they are gone, and return what it all came from.

        Raises:
            EngineDeadError: nobody can end them.
        """
        if self._keeper is None:
            raise EngineDeadError(noticed.text)
        try:
            self._keeper.end(epoch, noticed.text)
            return first_cause([self._wait_for_end(epoch), noticed])
        except TransportError as error:
            raise EngineDeadError(f"{noticed.text}\nand its group could not be ended: {error}") from error

    def _wait_for_end(self, epoch: int) -> Cause:
        assert self._keeper is not None
        deadline_s = time.monotonic() + _END_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            ended = self._keeper.receive(left_s)
            if ended is not None and ended.epoch == epoch:
                return cause_of_end(ended)
        raise TransportError(f"the supervisor has not ended epoch {epoch} within {_END_S:g} s")

    def judge(
        self, epoch: int, cause: Cause, in_step: Collection[Hashable], unfinished: Collection[Hashable]
    ) -> Guilty | None:
        """Decide that the group is replaced, and whether a request is to blame.

        Args:
            epoch: the group that has died.
            cause: what it died of.
            in_step: the requests of the step that it died in, if any.
            unfinished: all requests.

        Raises:
            EngineDeadError: it is not replaced; says why if there was a choice.
        """
        self._suspects.keep_only(unfinished)
        was_trial = self._suspects.was_alone(in_step)
        verdict = self._suspects.step_died(epoch, in_step, cause.is_from_outside) if in_step else None
        if cause.is_input_error:
            raise EngineDeadError(cause.text)
        self._spend(epoch, cause, was_trial)
        if verdict is None:
            return None
        self._budget.give_back(verdict.epochs)
        return Guilty(
            verdict.key,
            f"ranks died {len(verdict.epochs)} times in a step that contained this request, in the end while it"
            f" ran alone, so it is not tried again; the last time: {cause.gist}",
        )

    def _spend(self, epoch: int, cause: Cause, was_trial: bool) -> None:
        supervision = self._supervision
        if was_trial and self._budget.try_spend_on_trial():
            _LOG.warning("%s; that was a request alone, under suspicion: starting the ranks again", cause.gist)
        elif not was_trial and self._budget.try_spend(self._clock(), epoch):
            spent = (self._budget.num_spent, supervision.max_restarts, supervision.restart_window_s)
            _LOG.warning("%s; starting the ranks again, restart %d of %d in %g s", cause.gist, *spent)
        elif supervision.max_restarts == 0:
            raise EngineDeadError(cause.text)
        else:
            raise EngineDeadError(
                f"{cause.text}; the ranks are not started again: that has been done {epoch} times, and"
                f" {supervision.max_restarts} times in {supervision.restart_window_s:g} s are allowed"
                " (supervision.max_restarts, restart_window_s)"
            )
        _LOG.info("the failure in full:\n%s", cause.text)
