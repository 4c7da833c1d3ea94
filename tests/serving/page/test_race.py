"""Races in a real browser, on the real server with the shipped model: what is said, judged, stopped."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.serving.page.visiting import SLOW, answer, bodies, choose, eventually, over, race, ready

pytestmark = pytest.mark.browser


def test_a_race_says_what_the_api_answers_and_judges_both(served, visit):
    page = ready(visit(served.url))
    for task, index in (("path_star", 2), ("tree_path", 3)):
        choose(page, task, index)
        race(page)
        for name in ("one", "two"):
            text, injections, correct = answer(served, task, index, name)
            assert page.locator(f"#{name}-verdict").inner_text() == ("✓ right" if correct else "✕ wrong")
            end = page.locator(f"#{name}-said .end")
            said = page.locator(f"#{name}-said").inner_text().removesuffix(end.inner_text()).strip()
            assert said == text.strip()
            marks = page.locator(f"#{name}-said .injected").all()
            assert [int(mark.get_attribute("data-position")) for mark in marks] == [
                injection["position"] + 1 for injection in injections
            ]


def test_system_2_finds_the_way_that_system_1_misses(served, visit):
    index = next(i for i in range(20) if not answer(served, "path_star", i, "one")[2])
    page = ready(visit(served.url))
    choose(page, "path_star", index)
    race(page)
    assert page.locator("#one-verdict").inner_text() == "✕ wrong"
    assert page.locator("#two-verdict").inner_text() == "✓ right"
    steps = len(served.get(f"/v1/crsm/problems/path_star?index={index}")["data"]["path"]) - 1
    assert page.locator("#graph .path.two .stroke").count() == steps
    assert page.locator("#graph .path.two .wrong").count() == 0
    assert page.locator("#graph .path.one .wrong").count() > 0
    assert "is wrong" in page.locator("#graph svg").get_attribute("aria-label")


def test_the_end_of_a_race_is_announced_once_and_not_by_token(served, visit):
    page = ready(visit(served.url))
    page.evaluate(
        """() => {
          const announcer = document.querySelector("#announcer");
          window.announced = [];
          new MutationObserver(() => announced.push(announcer.textContent)).observe(announcer, { childList: true });
        }"""
    )
    race(page)
    text, _, _ = answer(served, "path_star", 0, "two")
    began, ended = page.evaluate("announced")
    assert began == "The race has begun."
    assert f"System 2 said: {text.strip()}. Right." in ended
    assert page.locator("#two-said").get_attribute("aria-live") is None


def test_give_me_a_problem_goes_to_the_next_one(served, visit):
    page = ready(visit(served.url))
    for index in (0, 1, 2):
        assert page.locator("#index").input_value() == str(index)
        assert (
            page.locator("#prompt").input_value() == served.get(f"/v1/crsm/problems/path_star?index={index}")["prompt"]
        )
        with page.expect_response(re.compile(f"index={index + 1}")):
            page.locator("#next-problem").click()
    with page.expect_response(re.compile("/v1/crsm/problems/")):
        page.locator("#random-problem").click()


def test_ones_own_prompt_is_raced_and_not_judged(served, visit):
    page = ready(visit(served.url))
    prompt = served.get("/v1/crsm/problems/path_star?index=5")["prompt"]
    sent = bodies(page)
    page.locator("#prompt").fill("")
    page.locator("#prompt").press_sequentially(prompt)
    assert page.locator("#graph-panel").is_hidden()
    page.locator("#prompt").press("Control+Enter")
    over(page)
    assert {body["prompt"] for body in sent} == {prompt}
    assert page.locator("#two-verdict").inner_text() == "not checked"
    assert answer(served, "path_star", 5, "two")[0].strip() in page.locator("#two-said").inner_text()


def test_a_prompt_that_the_model_cannot_read_is_answered_in_the_servers_words(served, visit):
    page = ready(visit(served.url, may_fail=True))
    page.locator("#prompt").fill("what is the way to Uqbar")
    page.locator("#start").click()
    message = page.locator("#error-text")
    message.wait_for()
    body = {"model": "nano", "prompt": "what is the way to Uqbar"}
    assert message.inner_text() == httpx.post(f"{served.url}/v1/completions", json=body).json()["error"]["message"]
    assert page.locator("#errors").get_attribute("role") == "alert"
    assert page.locator("#two-verdict").inner_text() == "failed"
    page.locator("#error-close").click()
    assert page.locator("#errors").is_hidden()
    choose(page, "path_star", 1)
    race(page)
    assert page.locator("#two-verdict").inner_text() == "✓ right"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_a_race_can_be_stopped_and_the_server_stops_too(paced, visit, how):
    page = ready(visit(paced.url, SLOW))
    page.locator("#start").click()
    page.locator("#two-said .token").first.wait_for()
    assert paced.running == 2
    if how == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    over(page)
    assert [page.locator(f"#{name}-verdict").inner_text() for name in ("one", "two")] == ["stopped", "stopped"]
    assert page.locator("#start").is_enabled() and page.locator("#errors").is_hidden()
    with eventually() as wait:
        wait(lambda: paced.running == 0)


def test_a_reload_in_mid_race_ends_the_race_and_keeps_the_settings(paced, visit):
    page = ready(visit(paced.url, SLOW))
    choose(page, "tree_path", 4)
    page.locator("#set-lag").focus()
    page.keyboard.press("ArrowLeft")
    page.locator("#theme").select_option("dark")
    page.locator("#start").click()
    page.locator("#two-said .token").first.wait_for()
    page.reload()
    with eventually() as wait:
        wait(lambda: paced.running == 0)
    ready(page)
    assert page.locator("#out-lag").inner_text() == "1 token"
    assert page.locator("#out-pace").inner_text() == "1 tokens/s"
    assert (page.locator("#task").input_value(), page.locator("#index").input_value()) == ("tree_path", "4")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("#two-said .token").count() == 0


def test_another_problem_in_mid_race_leaves_nothing_of_the_old_one(paced, visit):
    page = ready(visit(paced.url, SLOW))
    page.locator("#start").click()
    page.locator("#two-said .token").first.wait_for()
    page.locator("#next-problem").click()
    page.locator("#two-said .placeholder").wait_for()
    with eventually() as wait:
        wait(lambda: paced.running == 0)
    assert page.locator("#two-verdict").inner_text() == ""
    assert page.locator("#start").is_enabled() and page.locator("#export-log").is_disabled()
