"""Every request has an id and a line in the log, which holds nothing that was said."""

from __future__ import annotations

import logging

import pytest

from tests.support.fake_server import FakeServer, fake_server
from tprt.server.tokenizer import Tokenizer

LOGGER = "tprt.server.http.request_log"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("tprt"), "propagate", True)
    caplog.set_level(logging.INFO, LOGGER)
    return caplog


@pytest.mark.parametrize("streams", [False, True])
def test_a_line_tells_how_a_request_went(
    server: FakeServer, lines: pytest.LogCaptureFixture, streams: bool
) -> None:
    server.chat("a secret prompt", stream=streams)
    (record,) = lines.records
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["endpoint"] == "/v1/chat/completions"
    assert (fields["method"], fields["status"], fields["finish_reason"]) == ("POST", 200, "stop")
    assert fields["prompt_tokens"] == len(server.engine.submitted[0][0])
    assert fields["output_tokens"] == len("An answer: 42 ✓.".encode()) + 1
    assert 0 <= fields["first_token_s"] <= fields["duration_s"]
    assert fields["request_id"] in record.getMessage()
    for said in ("secret", "answer: 42"):
        assert said not in record.getMessage()
        assert said not in str(fields)


def test_a_sane_request_id_is_taken_over(server: FakeServer) -> None:
    response = server.client.get("/version", headers={"X-Request-Id": "my-id_1.2:3"})
    assert response.headers["x-request-id"] == "my-id_1.2:3"
    for bad in ("a b", "x" * 129, "<script>", ""):
        made = server.client.get("/version", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32


def test_the_id_of_an_answer_holds_that_of_its_request(server: FakeServer) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "mine"})
    assert response.json()["id"] == "cmpl-mine"
    assert server.engine.submitted[0][2] == "cmpl-mine"


def test_paths_that_there_are_not_are_not_written(server: FakeServer, lines: pytest.LogCaptureFixture) -> None:
    server.client.get("/what/is?key=secret")
    (record,) = lines.records
    assert record.fields["status"] == 404  # type: ignore[attr-defined]
    assert "secret" not in record.getMessage()
    assert "what" not in record.getMessage()


def test_probes_that_go_well_leave_no_line(server: FakeServer, lines: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/ready", "/metrics", "/version"):
        server.client.get(path)
    assert lines.records == []


def test_no_lines_are_written_when_they_are_turned_off(
    byte_tokenizer: Tokenizer, lines: pytest.LogCaptureFixture
) -> None:
    with fake_server(byte_tokenizer, log_requests=False) as server:
        assert server.chat().status_code == 200
    assert lines.records == []
