"""A server with keys lets nobody in without one, except to see that it lives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.support.fake_server import CHAT, FakeServer, fake_server
from tprt.server.tokenizer import Tokenizer

KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture
def locked(byte_tokenizer: Tokenizer) -> Iterator[FakeServer]:
    with fake_server(byte_tokenizer, KEYS, allowed_origins=("https://page.example",)) as server:
        yield server


def status(client: TestClient, path: str, authorization: str | bytes | None) -> int:
    headers = {} if authorization is None else {"Authorization": authorization}
    return client.get(path, headers=headers).status_code


def test_any_of_the_keys_opens(locked: FakeServer) -> None:
    for key in KEYS:
        assert status(locked.client, "/v1/models", b"Bearer " + key.encode()) == 200
    assert status(locked.client, "/v1/models", "bearer first-key") == 200


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-key2", "Basic first-key"]
)
def test_all_else_is_shut_out_everywhere(locked: FakeServer, authorization: str | None) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/state", "/nowhere", "/health/"):
        assert status(locked.client, path, authorization) == 401


def test_the_error_is_openais_and_does_not_repeat_the_key(locked: FakeServer) -> None:
    response = locked.client.post(CHAT, json={}, headers={"Authorization": "Bearer wrong-key"})
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "wrong-key" not in response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


def test_probes_and_the_page_are_open(locked: FakeServer) -> None:
    for path in ("/health", "/ready", "/"):
        assert status(locked.client, path, None) == 200


def test_pages_of_allowed_origins_may_ask_and_no_others(locked: FakeServer) -> None:
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        response = locked.client.options(CHAT, headers=headers)
        assert (response.headers.get("access-control-allow-origin") == origin) is allowed
        assert (response.status_code == 200) is allowed


def test_without_settings_no_other_page_may_ask(server: FakeServer) -> None:
    response = server.client.get("/version", headers={"Origin": "https://page.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
