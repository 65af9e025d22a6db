"""A real Chromium, and what must hold for every page that it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# Long enough for a machine that does other things as well.
_WAIT_MS = 20_000


@dataclass
class Visit:
    """One page, and what has happened on it."""

    page: Page
    origin: str
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def assert_clean(self) -> None:
        """Assert that nothing was written to the console and nothing was asked of another origin."""
        assert self.errors == []
        assert self.elsewhere == []


def visit(browser: Browser, url: str, **options: object) -> Visit:
    """Open `url` in a context of its own, and note what happens."""
    page = browser.new_page(**options)  # type: ignore[arg-type]
    page.set_default_timeout(_WAIT_MS)
    expect.set_options(timeout=_WAIT_MS)
    made = Visit(page, url)

    def note(request_url: str) -> None:
        parts = urlsplit(request_url)
        if parts.scheme != "data" and f"{parts.scheme}://{parts.netloc}" != url:
            made.elsewhere.append(request_url)

    page.on("console", lambda message: made.errors.append(message.text))
    page.on("pageerror", lambda error: made.errors.append(str(error)))
    page.on("request", lambda request: note(request.url))
    page.goto(url)
    return made
