"""What is seen of a race: marked positions, the search tree, the timeline."""

from __future__ import annotations

import re

import pytest

from tests.serving.page.visiting import answer, race, ready

pytestmark = pytest.mark.browser


def test_a_marked_position_explains_its_plan_to_pointer_and_keyboard(served, visit):
    page = ready(visit(served.url))
    race(page)
    _, injections, _ = answer(served, "path_star", 0, "two")
    tip = page.locator("#tooltip")
    assert tip.is_hidden()
    marks = page.locator("#two-said .injected")
    for place, injection in enumerate(injections):
        marks.nth(place).hover()
        gates = [float(text) for text in page.locator("#tooltip tbody tr td:nth-child(3)").all_inner_texts()]
        assert gates == pytest.approx(injection["gates"], abs=0.005)
        alphas = [float(text) for text in page.locator("#tooltip tbody tr td:nth-child(4)").all_inner_texts()]
        assert alphas == pytest.approx(injection["alpha"], abs=0.0005)
        assert f"{injection['value_now']:.2f} → {injection['value_planned']:.2f}" in tip.inner_text()
        assert " → ".join(injection["line"].split()) in tip.inner_text()
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")
    # One stop of the tab order, arrows from there.
    marks.first.focus()
    assert tip.is_visible() and marks.first.get_attribute("aria-describedby") == "tooltip"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.position") == str(injections[-1]["position"] + 1)
    assert f"before position {injections[-1]['position']}" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    assert page.locator("#two-said .injected[tabindex='0']").count() == 1


def test_a_position_that_is_scrolled_to_by_the_keyboard_is_explained_all_the_same(served, visit):
    page = ready(visit(served.url, viewport={"width": 360, "height": 400}))
    race(page)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.locator("#two-said .injected").first.focus()
    page.wait_for_timeout(400)
    assert page.evaluate("scrollY") < page.evaluate("document.body.scrollHeight") - 400
    assert page.locator("#tooltip").is_visible()
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.locator("#tooltip").wait_for(state="hidden")


def test_the_search_tree_shows_the_principal_variation_and_its_visits(served, visit):
    page = ready(visit(served.url))
    race(page)
    _, injections, _ = answer(served, "path_star", 0, "two")
    best = max(injections, key=lambda each: each["value_planned"] - each["value_now"])
    line = best["line"].split()
    page.locator("#tree svg").wait_for()
    assert page.locator("#tree-words").inner_text().find(" → ".join(line)) > 0
    principal = page.locator("#tree .node.principal text").all_text_contents()
    assert [word for word in principal if word] == line
    page.locator(".tree-panel summary").click()
    visits = [int(text) for text in page.locator("#tree-moves td:nth-child(2)").all_inner_texts()]
    assert visits == sorted(visits, reverse=True) and sum(visits) == 64
    # Every plan can be stepped to.
    count = int(re.search(r"of (\d+)", page.locator("#plan-number").inner_text()).group(1))
    while page.locator("#plan-later").is_enabled():
        page.locator("#plan-later").click()
        page.wait_for_timeout(300)
    assert page.locator("#plan-number").inner_text() == f"plan {count} of {count}"


def test_the_timeline_has_a_span_and_a_row_for_every_request(served, visit):
    page = ready(visit(served.url))
    race(page)
    _, injections, _ = answer(served, "path_star", 0, "two")
    page.locator("#timeline svg").wait_for()
    page.wait_for_timeout(300)
    spans = page.locator("#timeline .span").count()
    assert page.locator("#timeline .span .mark.disc").count() == len(injections)
    page.locator(".timeline-panel > details summary").click()
    outcomes = page.locator("#timeline-rows td:nth-child(3)").all_inner_texts()
    assert len(outcomes) == spans > 0
    assert outcomes.count("on time") == len(injections) and "open" not in outcomes
    assert f"{spans} asked for, {len(injections)} written" in page.locator("#timeline-note").inner_text()


def test_the_tree_grows_unless_less_motion_is_wanted(paced, visit):
    for motion, grows in (("no-preference", True), ("reduce", False)):
        page = ready(visit(paced.url, {"pace": 2}, reduced_motion=motion))
        page.locator("#start").click()
        page.locator("#tree svg").wait_for()
        assert (page.evaluate("document.getAnimations().length") > 0) is grows
        page.keyboard.press("Escape")
