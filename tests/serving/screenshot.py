"""The picture of the page in the documentation: ``python -m tests.serving.screenshot docs/serving-page.png``.

A race on the first ``path_star`` problem that System 1 gets wrong and System 2 right, looked at right after its end. It
runs by the wall clock at the page's own pace, so that the figures in the picture differ a little from run to run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.serving.page.page_server import chromium, serve_page

WIDTH = 1440
TRIES = 20
SETTLED = 800
"""Milliseconds until everything is drawn."""


def take(file: Path, scheme: str) -> int:
    """Writes the picture; returns the number of the problem."""
    with serve_page("wall") as served, chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
        page.goto(served.url)
        page.locator("#graph svg").wait_for()
        for _ in range(TRIES):
            page.locator("#start").click()
            page.locator("#stop:disabled").wait_for()
            verdicts = [page.locator(f"#{name}-verdict").inner_text() for name in ("one", "two")]
            if verdicts == ["✕ wrong", "✓ right"]:
                break
            with page.expect_response("**/v1/crsm/problems/**"):
                page.locator("#next-problem").click()
        else:
            raise RuntimeError(f"no problem of {TRIES} was as wanted")
        page.locator("#score-start").click()
        page.locator("#score-start:enabled").wait_for(timeout=120_000)
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(SETTLED)
        page.screenshot(path=file, full_page=True)
        return int(page.locator("#index").input_value())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    asked = parser.parse_args()
    print(f"problem {take(asked.file, asked.scheme)}, {asked.file.stat().st_size:,} bytes")
