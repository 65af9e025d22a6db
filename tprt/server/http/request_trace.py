"""An OpenTelemetry span for each request for an answer, made from its record once it has ended.

Spans and attributes are named as vLLM names them, so that what reads its traces reads these; no prompt and no
output is in them. They are sent in the background: a collector that is slow or gone costs spans, never a
request. Needs the extra `otel`. Knows nothing of settings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from tprt.log import get_logger
from tprt.server.http.request_log import RequestRecord

_log = get_logger(__name__)
_ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions"})
_SPAN = "llm_request"
_INTERNAL_ERROR = 500


class OtlpTracer:
    """Sends spans to one collector."""

    def __init__(self, endpoint: str, service_name: str, model_name: str) -> None:
        """Begin to send to `endpoint`, a whole URL; the variables OTEL_* of the environment hold too."""
        self._model_name = model_name
        # At the program's end nothing is awaited that `close` has not awaited.
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: service_name}), shutdown_on_exit=False
        )
        self._exporter: SpanExporter = OTLPSpanExporter(endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(__name__)
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, endpoint: str, headers: Headers, record: RequestRecord) -> None:
        """Make a span of a request for an answer that has ended; of others none.

        It is a child of the span that the header `traceparent` names, if there is one.
        """
        if endpoint not in _ENDPOINTS:
            return
        duration_s, end_ns = time.monotonic() - record.started_s, time.time_ns()
        span = self._tracer.start_span(
            _SPAN,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=end_ns - int(duration_s * 1e9),
            attributes=_attributes(self._model_name, endpoint, record, duration_s),
        )
        if (record.status or _INTERNAL_ERROR) >= _INTERNAL_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def close(self, timeout_s: float) -> None:
        """Send what has not been sent, in `timeout_s` at most; what then is left is lost."""
        # The provider's own wait has no deadline that could be set.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            # It does not try again.
            self._exporter.shutdown()
            _log.warning("the last spans could not be sent in %g s and are lost", timeout_s)


def _attributes(
    model_name: str, endpoint: str, record: RequestRecord, duration_s: float
) -> Mapping[str, str | float | tuple[str, ...]]:
    attributes: dict[str, str | float | tuple[str, ...]] = {
        "gen_ai.request.id": record.request_id,
        "gen_ai.response.model": model_name,
        "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": record.num_output_tokens,
        "gen_ai.latency.e2e": duration_s,
        "http.route": endpoint,
        "http.response.status_code": record.status or _INTERNAL_ERROR,
    }
    if record.queue_s is not None:
        attributes["gen_ai.latency.time_in_queue"] = record.queue_s
    if record.first_token_s is not None:
        attributes["gen_ai.latency.time_to_first_token"] = record.first_token_s
    if record.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = tuple(record.finish_reason.split(","))
    if (sampling := record.sampling) is not None:
        attributes["gen_ai.request.n"] = record.num_choices
        attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
        attributes["gen_ai.request.temperature"] = sampling.temperature
        attributes["gen_ai.request.top_p"] = sampling.top_p
    return attributes
