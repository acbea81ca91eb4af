"""A real Chromium before a real Space. Every page is watched: no foreign host, no error in the console."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

from tests.space.conftest import Stage, empty_space, space  # noqa: F401 - fixtures of this folder too

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one file only: while Playwright is there, an event loop runs, and no test can start its own."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(BROWSERS)})")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(Path(found)), args=QUIET)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens an address in a fresh context; afterwards nothing foreign was asked for and nothing went wrong."""
    wrong: list[str] = []
    contexts = []

    def opened(address: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        own = address.split("/?")[0]

        def asked(request: Request) -> None:
            if not request.url.startswith((own, "data:", "blob:")):
                wrong.append(f"asked for {request.url}")

        page.on("request", asked)
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on("console", lambda told: wrong.append(f"console: {told.text}") if told.type == "error" else None)
        page.goto(address)
        page.get_by_role("tab", name="Submit").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
