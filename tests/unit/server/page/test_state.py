"""The page and its state as any program gets them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest

from tests.support.page_server import MODEL, SECRET, PageServer, serving
from tprt.server.page.state import MAX_REQUESTS

KEY = "a-key-of-the-test"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    made = PageServer(tmp_path)
    made.run_ranks()
    made.run_requests()
    yield made
    made.close()


def get(url: str, key: str = "") -> tuple[int, bytes, HTTPMessage]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def state_of(server: PageServer, query: str = "") -> dict[str, Any]:
    with serving(server.app) as url:
        status, body, headers = get(f"{url}/state{query}")
    assert (status, headers["cache-control"]) == (200, "no-store")
    state: dict[str, Any] = json.loads(body)
    return state


def test_the_state_tells_of_engine_ranks_and_requests(server: PageServer) -> None:
    state = state_of(server)
    assert (state["model"], state["is_ready"], state["is_well"]) == (MODEL, True, True)
    assert 74 <= state["uptime_s"] < 120
    assert state["engine"]["num_preemptions"] == 4
    assert [rank["phase"] for rank in state["ranks"]] == ["decode", "prefill"]
    assert [rank["step_lag"] for rank in state["ranks"]] == [0, 2]
    assert all(rank["resident_bytes"] > 2**20 for rank in state["ranks"])
    assert state["num_requests"] == 3
    ages = [request["age_s"] for request in state["requests"]]
    assert ages == sorted(ages, reverse=True), "the oldest come first"
    assert [request["num_tokens"] for request in state["requests"]] == [10, 5, 0]


def test_the_state_holds_no_prompt_no_output_and_no_whole_id(server: PageServer) -> None:
    text = json.dumps(state_of(server))
    assert SECRET not in text
    assert "0123456789" not in text
    keys = {"id", "age_s", "num_prompt_tokens", "num_tokens", "max_tokens"}
    assert all(request.keys() == keys for request in json.loads(text)["requests"])


def test_the_list_of_requests_is_bounded_and_all_are_counted(server: PageServer) -> None:
    server.engine.requests *= 100
    state = state_of(server)
    assert (len(state["requests"]), state["num_requests"]) == (MAX_REQUESTS, 300)


def test_the_history_comes_when_it_is_asked_for(server: PageServer) -> None:
    server.live_for(20)
    assert state_of(server)["history"] == []
    moments = state_of(server, "?history=true")["history"]
    assert [moment["totals"]["generated_tokens"] for moment in moments] == list(range(10, 210, 10))
    assert all(sum(moment["totals"]["first_token"]["counts"]) for moment in moments)


def test_before_the_engine_is_there_the_state_says_so(server: PageServer) -> None:
    server.engine.ready = server.engine.stats = None
    server.heartbeats.unlink()
    state = state_of(server)
    assert (state["is_ready"], state["engine"], state["ranks"]) == (False, None, [])


def test_the_page_allows_its_own_script_and_style_and_nothing_else(server: PageServer) -> None:
    with serving(server.app) as url:
        status, body, headers = get(url + "/")
    page = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_place_and_sets_no_markup() -> None:
    page = (Path(__file__).parents[4] / "tprt/server/page/page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}, (
        "a name space, not a place"
    )
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        " style=",
        "onclick=",
    ):
        assert forbidden not in page


def test_with_a_key_the_page_is_open_and_its_state_is_not(tmp_path: Path) -> None:
    server = PageServer(tmp_path, api_keys=(KEY,))
    with serving(server.app) as url:
        assert get(url + "/")[0] == 200
        assert MODEL not in get(url + "/")[1].decode()
        assert get(url + "/state")[0] == 401
        assert get(url + "/state", "wrong")[0] == 401
        assert get(url + "/state", KEY)[0] == 200
    server.close()
