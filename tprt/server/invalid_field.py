"""A request that is wrong in one field. Knows nothing of what the fields mean."""

from __future__ import annotations

from tprt.errors import InvalidRequestError


class InvalidFieldError(InvalidRequestError):
    """One field of a request cannot be served; `field` is its path, as in `tools[0].function.name`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
