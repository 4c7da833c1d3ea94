"""Servers with the live page, a browser, and pages that are watched.

Every test ends with the same two questions: did the console stay empty, and did nothing leave the origin.
"""

from __future__ import annotations

import json

import pytest

from tests.serving.page.page_server import chromium, serve_page
from tests.serving.page.visiting import FAST, WAIT


@pytest.fixture(scope="module")
def served():
    with serve_page(maximum_planners=3) as server:
        yield server


@pytest.fixture(scope="module")
def paced():
    """A server by whose clock a race lasts."""
    with serve_page("wall") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser):
    """Opens the page of a server: ``visit(url, settings, **context)``; ``before`` gets it while it is empty."""
    contexts, problems = [], []

    def note_console(message, may_fail):
        # The browser itself reports every answer of 400 and above.
        if message.type in ("error", "warning") and not (may_fail and "Failed to load resource" in message.text):
            problems.append(f"console: {message.text}")

    def note_request(request, url):
        if not request.url.startswith((url, f"blob:{url}")):
            problems.append(f"request: {request.url}")

    def open_page(url, settings=FAST, may_fail=False, before=lambda page: None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(WAIT)
        stored = json.dumps(json.dumps(settings))
        context.add_init_script(f"if (!localStorage['crsm.settings']) localStorage['crsm.settings'] = {stored}")
        page = context.new_page()
        page.on("console", lambda message: note_console(message, may_fail))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: note_request(request, url))
        before(page)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium drops every connection, those of the loopback too, when an interface of the machine comes or goes.
    assert not any("ERR_NETWORK_CHANGED" in problem for problem in problems), "the machine's network changed: run again"
    assert problems == []
