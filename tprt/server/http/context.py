"""What the handlers of one server share.

Knows nothing of HTTP and makes none of it: the process's entry point does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tprt.config import Config
from tprt.server.http.request_log import RequestTracer
from tprt.server.sampling_defaults import SamplingDefaults
from tprt.server.tokenizer import Tokenizer
from tprt.transport.heartbeat import HeartbeatReader

if TYPE_CHECKING:
    from tprt.server.async_engine import AsyncEngine
    from tprt.server.metrics import ServerMetrics


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The parts that handlers work with.

    Attributes:
        config: the deployment.
        engine: takes requests and streams their tokens.
        tokenizer: None where the checkpoint has none; then prompts are token ids.
        metrics: what `/metrics` shows.
        model_name: the name that requests give as `model`.
        created_s: when the server started, in seconds since 1970.
        api_keys: any of them opens the server; with none, it is open.
        heartbeats: for each replica, returns what its ranks say of themselves, or None while there are none.
        tracer: makes spans of requests; None without traces.
        sampling_defaults: of requests that do not say how tokens are chosen.
    """

    config: Config
    engine: AsyncEngine
    tokenizer: Tokenizer | None
    metrics: ServerMetrics
    model_name: str
    created_s: int
    api_keys: tuple[str, ...]
    heartbeats: Sequence[Callable[[], HeartbeatReader | None]]
    tracer: RequestTracer | None = None
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
