"""The live page in a real browser."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.browsing import ARGUMENTS, CHROMIUM, Visit, visit
from tests.support.page_server import MODEL, SECRET, PageServer, serving

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}; apt-get install chromium brings it"
)
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    made = PageServer(tmp_path)
    yield made
    made.close()


@pytest.fixture
def shown(server: PageServer, browser: Browser) -> Iterator[Visit]:
    """The page of a server that works: two ranks, three requests, half a minute of history."""
    server.run_ranks()
    server.run_requests()
    server.live_for(30)
    with serving(server.app) as url:
        made = visit(browser, url)
        expect(made.page.get_by_role("heading", name=MODEL)).to_be_visible()
        yield made
        made.page.close()


def rows(page: Page, table: str) -> list[list[str]]:
    return [
        [cell.inner_text() for cell in row.locator("td").all()]
        for row in page.locator(f"#{table} tbody tr").all()
    ]


def tile(page: Page, name: str) -> str:
    return page.locator("#tiles div", has=page.get_by_text(name, exact=True)).locator("dd").inner_text()


def test_engine_ranks_and_requests_are_shown_and_nothing_else_is_loaded(shown: Visit) -> None:
    page = shown.page
    expect(page.get_by_role("status")).to_have_text("serving")
    assert tile(page, "KV blocks in use") == "40 %"
    assert tile(page, "prefix-cache hits") == "25 %"
    assert (tile(page, "epoch"), tile(page, "restarts of the ranks")) == ("1", "1")
    first, second = rows(page, "ranks")
    assert (first[1], first[4], first[5], first[7]) == ("cpu", "decode", "41", "0")
    assert (second[4], second[5], second[7], second[8], second[9]) == (
        "prefill",
        "39",
        "2",
        "7",
        "all_reduce 12",
    )
    assert second[11].endswith(("MiB", "GiB"))
    assert [row[3] for row in rows(page, "requests")] == ["10", "5", "0"]
    assert SECRET not in page.content()
    assert page.locator("h1").inner_text() == MODEL
    assert page.locator("h1 b").count() == 0, "what comes from the server is text"
    shown.assert_clean()


def test_the_charts_show_the_history_at_once_and_go_on(shown: Visit, server: PageServer) -> None:
    page = shown.page
    for chart in ("chart-throughput", "chart-requests", "chart-first", "chart-between"):
        points = page.locator(f"#{chart} path.one").get_attribute("d") or ""
        assert points.count("L") > 20, chart
    throughput = page.get_by_role("img", name="Tokens per second")
    expect(throughput).to_have_attribute("aria-label", re.compile("now: generated 0, prompt 0"))
    server.generate(1000)
    expect(throughput).to_have_attribute("aria-label", re.compile("now: generated [1-9]"))


def test_the_pointer_on_a_chart_tells_what_was_at_that_time(shown: Visit) -> None:
    throughput = shown.page.get_by_role("img", name="Tokens per second")
    box = throughput.bounding_box()
    assert box is not None
    ten_seconds_back = box["width"] - 4 - 10 / 300 * (box["width"] - 56)
    throughput.hover(position={"x": ten_seconds_back, "y": 60})
    expect(shown.page.locator("#chart-throughput .key.one")).to_have_text("generated 10")
    expect(shown.page.locator("#chart-throughput .key.two")).to_have_text("prompt 20")
    shown.assert_clean()


def test_the_chat_box_streams_and_tells_the_model_what_was_said_before(
    shown: Visit, server: PageServer
) -> None:
    page = shown.page
    server.pause_s = 0.15
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Message").press("Enter")
    answer = page.locator(".message.assistant p")
    expect(answer).to_have_text("An answer")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(answer).to_have_text("".join(server.words))
    expect(page.get_by_text("5 tokens, first words after")).to_be_visible()
    page.get_by_label("Message").fill("More")
    page.get_by_role("button", name="Send").click()
    expect(answer).to_have_count(2)
    assert server.asked[0]["messages"] == [{"role": "user", "content": "Hello"}]
    server.pause_s = 0.0
    expect(answer.last).to_have_text("".join(server.words))
    roles = [message["role"] for message in server.asked[1]["messages"]]  # type: ignore[attr-defined]
    assert roles == ["user", "assistant", "user"]
    assert server.asked[1]["model"] == MODEL
    shown.assert_clean()


def test_an_answer_can_be_stopped_by_the_keyboard(shown: Visit, server: PageServer) -> None:
    server.pause_s = 0.2
    server.words = ["word "] * 100
    prompt = shown.page.get_by_label("Message")
    prompt.fill("Hello")
    prompt.press("Enter")
    expect(shown.page.locator(".message.assistant p")).to_contain_text("word")
    prompt.press("Escape")
    expect(shown.page.get_by_text("stopped", exact=True)).to_be_visible()
    expect(shown.page.get_by_role("button", name="Send")).to_be_enabled()


def test_no_script_request_or_frame_but_its_own_can_run(shown: Visit) -> None:
    page = shown.page
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.injected = true';
        document.head.append(script);
    }""")
    assert page.evaluate("() => window.injected") is None
    blocked = page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')")
    assert blocked == "blocked"
    assert sum("Content Security Policy" in error for error in shown.errors) >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_in_dark(
    server: PageServer, browser: Browser, tmp_path: Path, scheme: str
) -> None:
    server.run_ranks()
    server.run_requests()
    server.live_for(30)
    with serving(server.app) as url:
        shown = visit(browser, url, color_scheme=scheme, viewport={"width": 360, "height": 740})
        expect(shown.page.locator("#ranks tbody tr")).to_have_count(2)
        colors = {
            selector: shown.page.evaluate(_COLORS, selector)
            for selector in ("h1", "dt", "dd", "td", "th", "#health", ".who, .key", "button", "textarea")
        }
        assert {name: pair for name, pair in colors.items() if contrast(*pair) < 4.5} == {}
        is_dark = luminance(colors["h1"][1]) < 0.2
        assert is_dark == (scheme == "dark")
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360, (
            "the page is wider than a phone"
        )
        assert shown.page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True).startswith(b"\x89PNG")
        shown.assert_clean()
        shown.page.close()


def test_everything_that_can_be_used_has_a_name_and_is_reached_by_tab(shown: Visit) -> None:
    page = shown.page
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "max-tokens", "temperature", "send", "clear", "log"} <= reached
    for name in ("Message", "Most tokens", "Temperature"):
        expect(page.get_by_label(name)).to_be_visible()
    for role, names in {
        "table": ["", ""],
        "img": ["Tokens per second", "Requests", "Time to first token", "Time between tokens"],
        "region": ["Ranks", "Running requests"],
        "button": ["Send", "Stop", "New conversation"],
    }.items():
        for name in names:
            expect(page.get_by_role(role, name=name).first).to_be_visible()  # type: ignore[arg-type]


def test_a_server_that_is_gone_is_said_so_and_the_page_goes_on_when_it_is_back(
    server: PageServer, browser: Browser
) -> None:
    with serving(server.app) as url:
        shown = visit(browser, url)
        expect(shown.page.get_by_role("status")).to_have_text("serving")
    banner = shown.page.get_by_role("alert").first
    expect(banner).to_contain_text("No connection to the server since")
    server.engine.health = (False, "no progress for 31 s")
    with serving(server.app, port=int(url.rpartition(":")[2])):
        expect(banner).to_be_hidden()
        expect(shown.page.get_by_role("status")).to_have_text("no progress for 31 s")
        shown.page.close()


def test_ranks_that_are_replaced_and_a_start_are_shown_as_such(shown: Visit, server: PageServer) -> None:
    assert server.engine.stats is not None
    server.engine.health = (True, "the ranks are being replaced")
    server.engine.stats = dataclasses.replace(server.engine.stats, epoch=2, is_serving=False)
    expect(shown.page.get_by_role("status")).to_have_text("the ranks are being replaced")
    assert tile(shown.page, "epoch") == "2"
    server.engine.health = (True, "the ranks are not ready yet")
    server.engine.ready = server.engine.stats = None
    expect(shown.page.get_by_role("status")).to_have_text("the ranks are not ready yet")
    assert tile(shown.page, "KV blocks in use") == "\u2013"
    shown.assert_clean()


def test_without_a_key_nothing_is_shown_and_with_it_the_page_keeps_it_to_itself(
    tmp_path: Path, browser: Browser
) -> None:
    server = PageServer(tmp_path, api_keys=(KEY,))
    with serving(server.app) as url:
        shown = visit(browser, url)
        page = shown.page
        field = page.get_by_role("textbox", name="API key")
        expect(field).to_be_focused()
        expect(page.locator("main")).to_be_hidden()
        assert MODEL not in page.inner_text("body")
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_text("The server refused that key.")).to_be_visible()
        field.fill(KEY)
        page.get_by_role("button", name="Show the page").click()
        expect(page.get_by_role("heading", name=MODEL)).to_be_visible()
        page.get_by_label("Message").fill("Hello")
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".message.assistant p")).to_have_text("".join(server.words))
        assert page.context.cookies() == []
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert KEY not in page.content()
        page.reload()
        expect(page.get_by_role("textbox", name="API key")).to_be_visible()
        page.close()
    server.close()


_COLORS = """(selector) => {
    let node = document.querySelector(selector);
    const color = getComputedStyle(node).color;
    while (getComputedStyle(node).backgroundColor === 'rgba(0, 0, 0, 0)') node = node.parentElement;
    return [color, getComputedStyle(node).backgroundColor];
}"""


def luminance(color: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)` as WCAG 2 defines it."""
    values = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
