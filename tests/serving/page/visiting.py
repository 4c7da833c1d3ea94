"""What a visitor of the page does, and what the API says to the same."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager

WAIT = 20_000
"""Milliseconds that something may take; a bound, not a claim."""
FAST = {"pace": 50}
SLOW = {"pace": 1}
"""Settings that the page remembers."""


def ready(page):
    page.locator("#graph svg").wait_for()
    page.locator("#start:enabled").wait_for()
    return page


def race(page):
    """Runs a race to its end."""
    page.locator("#start").click()
    over(page)


def over(page):
    page.locator("#stop:disabled").wait_for()
    for name in ("one", "two"):
        page.locator(f"#{name}-verdict:not(:empty)").wait_for()


def choose(page, task, index):
    page.locator("#task").select_option(task)
    page.locator("#index").fill(str(index))
    with page.expect_response(re.compile(r"/v1/crsm/problems/")):
        page.locator("#index").press("Tab")
    page.locator("#start:enabled").wait_for()


def bodies(page):
    """The bodies of the completion requests from now on."""
    found = []
    page.on("request", lambda request: found.append(request.post_data_json) if "completions" in request.url else None)
    return found


@contextmanager
def eventually(seconds=10.0):
    """Yields a function that waits until a question is answered with yes."""
    until = time.monotonic() + seconds

    def wait(question):
        while not question():
            assert time.monotonic() < until, "it did not come to that"
            time.sleep(0.02)

    yield wait


def answer(served, task, index, system):
    """The same question over the API, without a stream: the answer's text and its injections."""
    problem = served.get(f"/v1/crsm/problems/{task}?index={index}")
    crsm = {"channel": "off", "injection_rate": 0} if system == "one" else {}
    body = {"model": "nano", "prompt": problem["prompt"], "temperature": 0, "max_tokens": 16, "crsm": crsm}
    found = served.post("/v1/completions", body)
    text = found["choices"][0]["text"]
    checked = served.post("/v1/crsm/check", {"task": task, "index": index, "text": text})
    return text, found["crsm"]["choices"][0]["injections"], checked["correct"]
