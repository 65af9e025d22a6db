"""Every error that tprt raises on purpose.

Knows nothing of where an error is shown. A message says what was found, what was expected and what to
change, so that printing `str(error)` is enough for a user.
"""

from __future__ import annotations


class TprtError(Exception):
    """Base class: the message is written for the person who can act on it."""


class ConfigError(TprtError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class CheckpointError(TprtError):
    """The model folder, one of its files, or the fit of its tensors to the model is wrong."""


class UnsupportedModelError(TprtError):
    """The checkpoint names an architecture, or a variant of one, that tprt does not run."""


class ShardPlanError(TprtError):
    """The model cannot be split over the ranks asked for; the message lists the legal choices."""


class InvalidRequestError(TprtError):
    """One request cannot be served as it stands; other requests are not affected."""


class EngineBusyError(TprtError):
    """The queue is full, or the engine is not there yet: the same request may be served later.

    Attributes:
        retry_after_s: when it is worth trying again, in whole seconds from now, 1 or more.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TransportError(TprtError):
    """Base class of what can go wrong between processes."""


class TransportTimeoutError(TransportError):
    """A wait passed its deadline; the message names who was waited for and how far it had come."""


class PeerLostError(TransportError):
    """The process at the other end is gone. A consequence, not a cause: supervision ranks it last."""


class SequenceGapError(TransportError):
    """A message is missing: the sequence number received is not the one expected."""


class EngineDeadError(TprtError):
    """The engine cannot go on; the message carries the first cause with rank, phase and traceback."""
