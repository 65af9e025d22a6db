"""A collector of OTLP traces over HTTP: takes what an exporter sends and reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATH = "/collect/v1/traces"


@dataclass(frozen=True)
class ReceivedSpan:
    """A span, with its attributes and those of its resource as Python values."""

    span: Span
    attributes: dict[str, Any]
    resource: dict[str, Any]


class OtlpReceiver:
    """What has come so far."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}{PATH}"
        self.paths: set[str] = set()
        self.bodies: list[bytes] = []

    @property
    def spans(self) -> list[ReceivedSpan]:
        found = []
        for body in self.bodies:
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = _values(of_resource.resource.attributes)
                for of_scope in of_resource.scope_spans:
                    found += [ReceivedSpan(span, _values(span.attributes), resource) for span in of_scope.spans]
        return found


def _values(pairs: Any) -> dict[str, Any]:
    typed: list[KeyValue] = list(pairs)
    return {pair.key: _value(pair.value) for pair in typed}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, str(kind))


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Listen on a free port; at the end no thread is left."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.paths.add(self.path)
            receiver.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = OtlpReceiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
