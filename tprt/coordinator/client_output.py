"""From the news of one step to a `RequestOutput` for each client.

Knows nothing of how a client is reached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tprt.coordinator.result import StepResult
from tprt.messages import FinishReason, RequestOutput


class RequestKey(NamedTuple):
    """The name of a request in the engine: its client, and that client's id for it."""

    client_id: bytes
    request_id: int


def split_by_client(result: StepResult) -> Iterator[tuple[bytes, RequestOutput]]:
    """Yield each client that has news, with its rows; `result.keys` are `RequestKey`."""
    client_ids = [key.client_id for key in result.keys.tolist()]
    if not client_ids:
        return
    if client_ids.count(client_ids[0]) == len(client_ids):
        yield client_ids[0], _to_output(result)
        return
    rows: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, client_id in enumerate(client_ids):
        rows[client_id].append(row)
    for client_id, own_rows in rows.items():
        yield client_id, _to_output(result.select(np.array(own_rows, np.intp)))


def aborted_by_client(keys: Iterable[RequestKey]) -> Iterator[tuple[bytes, RequestOutput]]:
    """Yield each client of `keys` with the news that those requests have ended without a token."""
    request_ids: defaultdict[bytes, list[int]] = defaultdict(list)
    for key in keys:
        request_ids[key.client_id].append(key.request_id)
    for client_id, own_ids in request_ids.items():
        n = len(own_ids)
        yield (
            client_id,
            RequestOutput(
                request_ids=np.array(own_ids, np.int64),
                token_ids=np.full(n, -1, np.int32),
                finish_reasons=np.full(n, FinishReason.ABORT, np.uint8),
                num_cached_tokens=np.zeros(n, np.int32),
            ),
        )


def _to_output(result: StepResult) -> RequestOutput:
    return RequestOutput(
        request_ids=result.request_ids,
        token_ids=result.token_ids,
        finish_reasons=result.finish_reasons,
        num_cached_tokens=result.num_cached_tokens,
        queue_s=result.queue_s,
        logprobs=result.logprobs,
        top_token_ids=result.top_token_ids,
        top_logprobs=result.top_logprobs,
        num_top=result.num_top,
    )
