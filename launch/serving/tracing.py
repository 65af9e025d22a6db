"""Traces of requests, where they are asked for: whether they can be made, and who makes them.

OpenTelemetry is an extra, and is imported only here and only then. Knows nothing of requests.
"""

from __future__ import annotations

import os
from importlib import import_module

from tprt.config import ServerConfig
from tprt.errors import ConfigError
from tprt.server.http.request_log import RequestTracer

_TRACER = "tprt.server.http.request_trace"
_SERVICE_NAME = "OTEL_SERVICE_NAME"


def check_tracing(server: ServerConfig) -> None:
    """Import what traces need, if they are asked for.

    Raises:
        ConfigError: it is not installed.
    """
    if server.otlp_traces_endpoint is None:
        return
    try:
        import_module(_TRACER)
    except ImportError as error:
        raise ConfigError(
            f"server.otlp_traces_endpoint needs OpenTelemetry, which cannot be imported ({error}):"
            " pip install 'tprt[otel]', or leave the setting out"
        ) from None


def open_tracer(server: ServerConfig, model_name: str) -> RequestTracer | None:
    """Return who sends a span of each request of `model_name`; None where that is not asked for."""
    if server.otlp_traces_endpoint is None:
        return None
    from tprt.server.http.request_trace import OtlpTracer

    service_name = server.otlp_service_name or os.environ.get(_SERVICE_NAME) or "tprt"
    return OtlpTracer(server.otlp_traces_endpoint, service_name, model_name)
