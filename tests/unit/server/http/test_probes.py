"""Probes say whether the engine makes progress, and why not."""

from __future__ import annotations

from importlib.metadata import version

from tests.support.fake_server import FakeServer


def test_a_healthy_engine(server: FakeServer) -> None:
    health = server.client.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert server.client.get("/ready").json() == {"status": "ready"}


def test_a_stuck_engine_is_unhealthy_for_a_reason_without_paths(server: FakeServer) -> None:
    server.engine.health = (False, "rank 1 of /home/user/model is stuck\nTraceback")
    health = server.client.get("/health")
    assert health.status_code == 503
    assert health.json()["reason"] == "rank 1 of (path) is stuck"
    assert server.client.get("/ready").status_code == 503


def test_an_engine_that_loads_is_healthy_but_not_ready(server: FakeServer) -> None:
    server.engine.ready = None
    server.engine.health = (True, "the ranks are not ready yet")
    assert server.client.get("/health").json()["is_ready"] is False
    ready = server.client.get("/ready")
    assert ready.status_code == 503
    assert "Retry-After".lower() in ready.headers


def test_metrics_and_version(server: FakeServer) -> None:
    metrics = server.client.get("/metrics")
    assert metrics.status_code == 200
    assert metrics.headers["content-type"].startswith("text/plain")
    assert server.client.get("/version").json() == {"version": version("tprt")}
