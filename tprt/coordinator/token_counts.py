"""How often each token is in one output, kept up to date token by token. Knows nothing of penalties."""

from __future__ import annotations

import numpy as np

from tprt.messages import Int32Array

_FIRST_ROOM = 32


class TokenCounts:
    """The distinct tokens of one sequence, in the order in which they came, and their counts in the output."""

    def __init__(self, prompt_token_ids: Int32Array | None) -> None:
        """Start with the tokens of a prompt, of which the output has none yet, or with nothing."""
        known = np.empty(0, np.int32) if prompt_token_ids is None else np.unique(prompt_token_ids)
        self._size = len(known)
        room = max(_FIRST_ROOM, 2 * self._size)
        self._token_ids, self._counts = np.zeros(room, np.int32), np.zeros(room, np.int32)
        self._token_ids[: self._size] = known
        self._place_of = {token_id: place for place, token_id in enumerate(known.tolist())}

    @property
    def token_ids(self) -> Int32Array:
        """The distinct tokens, `[n]`: a view."""
        return self._token_ids[: self._size]

    @property
    def output_counts(self) -> Int32Array:
        """How often each of `token_ids` is in the output, `[n]`: a view."""
        return self._counts[: self._size]

    def take(self, token_ids: list[int]) -> None:
        """Count more tokens of the output."""
        for token_id in token_ids:
            place = self._place_of.get(token_id)
            if place is None:
                place = self._append(token_id)
            self._counts[place] += 1

    def _append(self, token_id: int) -> int:
        place = self._place_of[token_id] = self._size
        if place == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[place] = token_id
        self._size += 1
        return place
