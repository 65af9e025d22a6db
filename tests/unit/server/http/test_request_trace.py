"""A request for an answer is one span in vLLM's words at a real receiver, and costs the request nothing."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launch.serving.tracing import check_tracing, open_tracer
from tests.support.fake_server import MODEL, FakeServer, fake_server
from tests.support.otlp_receiver import PATH, OtlpReceiver, ReceivedSpan, otlp_receiver
from tprt.config import ServerConfig
from tprt.errors import ConfigError, EngineDeadError
from tprt.server.tokenizer import Tokenizer

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER_KIND, ERROR_STATUS = 2, 2
CLOSE_S = 10.0


@contextmanager
def traced(tokenizer: Tokenizer, endpoint: str, close_s: float = CLOSE_S) -> Iterator[FakeServer]:
    """Serve with traces, which have all been sent after the end."""
    settings = ServerConfig(otlp_traces_endpoint=endpoint, otlp_service_name="of tests")
    tracer = open_tracer(settings, MODEL)
    assert tracer is not None
    try:
        with fake_server(tokenizer, tracer=tracer) as server:
            yield server
    finally:
        tracer.close(close_s)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


def only_span(receiver: OtlpReceiver) -> ReceivedSpan:
    (span,) = receiver.spans
    return span


@pytest.mark.parametrize("streams", [False, True])
def test_a_span_tells_how_a_request_went_and_not_what_was_said(
    receiver: OtlpReceiver, byte_tokenizer: Tokenizer, streams: bool
) -> None:
    before_ns = time.time_ns()
    with traced(byte_tokenizer, receiver.endpoint) as server:
        server.engine.queue_s = 0.125
        body = {"prompt": "a secret", "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "n": 2}
        answer = server.complete(**body, stream=streams)
        num_prompt = len(server.engine.submitted[0][0])
    received = only_span(receiver)
    span, attributes = received.span, received.attributes
    assert (span.name, span.kind, received.resource["service.name"]) == ("llm_request", SERVER_KIND, "of tests")
    assert before_ns <= span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
    first_s, all_s = (attributes.pop(f"gen_ai.latency.{name}") for name in ("time_to_first_token", "e2e"))
    assert 0 < first_s <= all_s
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(all_s, abs=1e-5)
    assert attributes == {
        "gen_ai.latency.time_in_queue": 0.125,
        "gen_ai.request.id": answer.headers["x-request-id"],
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.completion_tokens": 18,
        "gen_ai.usage.prompt_tokens": num_prompt,
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
    }
    assert receiver.paths == {PATH}
    assert not any(b"secret" in body or b"An answer" in body for body in receiver.bodies)


def test_a_span_is_a_child_of_the_one_that_the_client_names(
    receiver: OtlpReceiver, byte_tokenizer: Tokenizer
) -> None:
    with traced(byte_tokenizer, receiver.endpoint) as server:
        for parent in (f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00", "00-nonsense"):
            server.client.headers["traceparent"] = parent
            server.chat()
    # Of the second the client has said that it is not sampled.
    spans = [received.span for received in receiver.spans]
    child, root = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert (child.trace_id.hex(), child.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert root.trace_id.hex() != TRACE_ID
    assert root.parent_span_id == b""


def test_a_request_that_is_refused_has_a_span_and_a_probe_has_none(
    receiver: OtlpReceiver, byte_tokenizer: Tokenizer
) -> None:
    with traced(byte_tokenizer, receiver.endpoint) as server:
        for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
            server.client.get(path)
        server.chat(temperature=-1)
    received = only_span(receiver)
    assert received.attributes["http.response.status_code"] == 400
    assert received.span.status.code != ERROR_STATUS
    assert "gen_ai.request.temperature" not in received.attributes
    assert [name for name in received.attributes if "latency" in name] == ["gen_ai.latency.e2e"]


def test_a_request_that_the_server_fails_is_an_error(receiver: OtlpReceiver, byte_tokenizer: Tokenizer) -> None:
    with traced(byte_tokenizer, receiver.endpoint) as server:
        server.engine.failure = EngineDeadError("rank 1 has died")
        assert server.chat().status_code >= 500
    assert only_span(receiver).span.status.code == ERROR_STATUS


def test_a_collector_that_does_not_answer_holds_up_neither_requests_nor_the_end(
    byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tprt"), "propagate", True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with traced(byte_tokenizer, endpoint, close_s=0.2) as server:
            assert server.chat().status_code == 200
            begun_s = time.monotonic()
        assert time.monotonic() - begun_s < 5.0
    assert "the last spans could not be sent in 0.2 s and are lost" in caplog.text
    for thread in threading.enumerate():
        if thread.name.startswith("OtelBatch"):
            thread.join(CLOSE_S)
            assert not thread.is_alive()


def test_without_an_endpoint_there_is_no_tracer() -> None:
    check_tracing(ServerConfig())
    assert open_tracer(ServerConfig(), MODEL) is None


def test_a_service_without_a_name_is_called_as_the_environment_says(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Tokenizer
) -> None:
    settings = ServerConfig(otlp_traces_endpoint=receiver.endpoint)
    for name in ("from outside", None):
        if name is None:
            monkeypatch.delenv("OTEL_SERVICE_NAME")
        else:
            monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        tracer = open_tracer(settings, MODEL)
        assert tracer is not None
        with fake_server(byte_tokenizer, tracer=tracer) as server:
            server.chat()
        tracer.close(CLOSE_S)
    assert [received.resource["service.name"] for received in receiver.spans] == ["from outside", "tprt"]


def test_a_missing_extra_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tprt.server.http.request_trace", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"needs OpenTelemetry, .*: pip install 'tprt\[otel\]'"):
        check_tracing(ServerConfig(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces"))


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "http://127.0.0.1:4317", "grpc://host:4317/x", "http://"])
def test_an_endpoint_that_is_no_whole_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="give the whole URL, its path too"):
        ServerConfig(otlp_traces_endpoint=url)
