"""Sliders, planners, keys; and what is said when something goes wrong."""

from __future__ import annotations

import json
import re

import pytest

from tests.serving.page.page_server import serve_page
from tests.serving.page.visiting import SLOW, bodies, eventually, over, race, ready

pytestmark = pytest.mark.browser


def test_sliders_set_what_the_next_request_carries(served, visit):
    page = ready(visit(served.url))
    sent = bodies(page)
    lag = page.locator("#set-lag")
    lag.focus()
    page.keyboard.press("ArrowRight")
    assert lag.get_attribute("aria-valuetext") == "3 tokens"
    box = page.locator("#set-simulations").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    shown = int(page.locator("#out-simulations").inner_text())
    assert shown < 64
    page.locator("#set-injection_rate").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    race(page)
    one, two = sorted(sent, key=lambda body: body["crsm"]["channel"] != "off")
    assert (two["crsm"]["lag"], two["crsm"]["simulations"], two["crsm"]["injection_rate"]) == (3, shown, 0.1)
    assert (one["crsm"]["channel"], one["crsm"]["injection_rate"], one["crsm"]["lag"]) == ("off", 0, 3)
    page.locator(".more > summary").click()
    page.locator("#reset").click()
    assert page.locator("#out-lag").inner_text() == "2 tokens"
    page.reload()
    ready(page)
    assert page.locator("#out-lag").inner_text() == "2 tokens"


def test_the_number_of_planners_is_asked_for_when_its_slider_is_let_go(served, visit):
    page = ready(visit(served.url))
    page.locator("#set-planners").focus()
    with page.expect_response(re.compile("/v1/crsm/planners")):
        page.keyboard.press("ArrowRight")
    assert served.backend.wanted[-1] == 2
    assert page.locator("#out-planners").inner_text() == "2"


def test_planners_that_cannot_be_counted_anew_have_no_slider(visit):
    with serve_page() as fixed:
        page = ready(visit(fixed.url))
        assert page.locator("#planners-row").is_hidden()


def test_a_key_is_asked_for_and_kept_for_the_tab(visit):
    with serve_page(api_keys=("opensesame",)) as locked:
        page = visit(locked.url, may_fail=True)
        page.locator("#key-form").wait_for()
        assert "key is missing" in page.locator("#error-text").inner_text()
        page.locator("#key").fill("sesame")
        page.locator("#key").press("Enter")
        page.get_by_text("key is not known").wait_for()
        page.locator("#key").fill("opensesame")
        page.get_by_role("button", name="Use it").click()
        ready(page)
        assert page.locator("#errors").is_hidden()
        race(page)
        assert page.locator("#two-verdict").inner_text() == "✓ right"
        page.reload()
        ready(page)
        assert page.evaluate("Object.keys(localStorage).filter((k) => localStorage[k].includes('opensesame'))") == []


def test_a_full_server_says_when_to_try_again(served, visit):
    page = ready(visit(served.url, may_fail=True))
    error = {"error": {"message": "too many generations", "type": "rate_limit_error", "param": None, "code": None}}
    full = {"status": 429, "headers": {"Retry-After": "3"}, "json": error}
    page.route("**/v1/completions", lambda route: route.fulfill(**full))
    page.locator("#start").click()
    over(page)
    assert page.locator("#error-text").inner_text() == "too many generations Try again in 3 s."


def test_a_stream_that_breaks_off_is_a_stated_failure(served, visit):
    page = ready(visit(served.url))
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body='data: {"choices": []}\n\n'),
    )
    page.locator("#start").click()
    over(page)
    assert page.locator("#error-text").inner_text() == "The stream broke off before its end."
    assert page.locator("#start").is_enabled()


def test_a_generator_that_dies_in_mid_race_is_a_stated_failure(visit):
    with serve_page("wall") as doomed:
        page = ready(visit(doomed.url, SLOW))
        page.locator("#start").click()
        page.locator("#two-said .token").first.wait_for()
        doomed.backend.close()
        over(page)
        assert [page.locator(f"#{name}-verdict").inner_text() for name in ("one", "two")] == ["failed", "failed"]
        assert page.locator("#error-text").inner_text() != ""
        assert page.locator("#start").is_enabled()


def test_a_server_that_is_gone_is_said_to_be(served, visit):
    page = ready(visit(served.url, may_fail=True))
    page.route("**/v1/**", lambda route: route.abort())
    page.locator("#start").click()
    over(page)
    assert page.locator("#error-text").inner_text() == "The server cannot be reached."


def test_a_server_that_starts_later_is_found(served, visit):
    asked = []

    def refuse_twice(route):
        asked.append(1)
        answer = {
            "error": {"message": "the generator is not ready", "type": "server_error", "param": None, "code": None}
        }
        if len(asked) < 3:
            route.fulfill(status=503, json=answer)
        else:
            route.continue_()

    page = visit(served.url, may_fail=True, before=lambda page: page.route("**/v1/crsm/info", refuse_twice))
    page.get_by_text("the generator is not ready").wait_for()
    ready(page)
    assert page.locator("#errors").is_hidden() and len(asked) == 3


@pytest.mark.parametrize("typed", ["", "0 1 | / 0 1 ="])
def test_nothing_can_be_raced_before_there_is_a_prompt(served, visit, typed):
    held = []
    page = visit(
        served.url, before=lambda page: page.route("**/v1/crsm/problems/**", lambda route: held.append(route), times=1)
    )
    page.locator("#task:enabled").wait_for()
    with eventually() as wait:
        wait(lambda: page.wait_for_timeout(20) or held)
    assert page.locator("#start").is_disabled()
    page.locator("#prompt").fill(typed)
    held[0].continue_()
    page.locator("#start:enabled").wait_for()
    assert page.locator("#prompt").input_value() == (typed or served.get("/v1/crsm/problems/path_star")["prompt"])
    assert page.locator("#graph-panel").is_visible() is (typed == "")


def test_a_long_answer_is_shown_whole(served, visit):
    """A thousand tokens with a plan for each, all at once."""
    page = ready(visit(served.url))
    chunks = []
    for n in range(1000):
        event = {
            "request": n,
            "position": 40 + n,
            "target": 42 + n,
            "lag": 2,
            "t": n / 1000,
            "line": "a",
            "assumed": "",
        }
        plan = event | {"type": "crsm.plan", "value_now": 0.5, "value_planned": 0.6, "gates": [1], "line_tokens": [0]}
        plan |= {"simulations": 1, "seconds": 0.001, "tree": {"token": None, "text": "", "visits": 1, "value": 0.5}}
        events = [event | {"type": "crsm.request"}, plan]
        if n >= 2:
            done = plan | {"request": n - 2, "position": 40 + n, "target": 40 + n}
            events.append(done | {"type": "crsm.inject", "reason": "on_time", "late": 0, "alpha": [0.1]})
        token = {"position": 40 + n, "id": 5, "text": " word", "logprob": -1.0, "injected": n > 2}
        crsm = {"events": events, "tokens": [token], "t": n / 1000, "log": []}
        chunks.append({"choices": [{"index": 0, "text": " word", "finish_reason": None}], "crsm": crsm})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    race(page)
    assert page.locator("#two-said .token").count() == 1000
    assert page.locator("#two-said .injected").count() == 997
    page.get_by_text("the last 400 positions are drawn").wait_for()
    assert page.locator("#timeline .head").count() <= 404
