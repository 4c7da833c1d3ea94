"""The live page in a real browser, on the real server with the shipped model.

Every test ends with the same two questions: did the console stay empty, and did nothing leave the origin.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager

import httpx
import pytest

from crsm.engine import Engine
from crsm.evaluation.statistics import mcnemar, wilson_interval
from crsm.event_log import read_log
from crsm.generation import GenerationRequest
from crsm.model import load_checkpoint
from tests.serving.page_server import chromium, serve_page

pytestmark = pytest.mark.browser

WAIT = 20_000
"""Milliseconds that something may take; a bound, not a claim."""
FAST = {"pace": 50}
SLOW = {"pace": 1}


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
    assert problems == []


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


# --------------------------------------------------------------------------------------------------------------- race


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
            marked = [
                int(each.get_attribute("data-position")) for each in page.locator(f"#{name}-said .injected").all()
            ]
            assert marked == [injection["position"] + 1 for injection in injections]


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
        """() => { window.announced = []; new MutationObserver(() => announced.push(document.querySelector("#announcer").textContent))
             .observe(document.querySelector("#announcer"), { childList: true }); }"""
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


# --------------------------------------------------------------------------------------------------------- what is seen


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


# ------------------------------------------------------------------------------------------------------------ controls


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


# ------------------------------------------------------------------------------------------------------ what goes wrong


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


# ----------------------------------------------------------------------------------------------------- score, exports


def test_a_score_is_that_of_the_api_with_its_interval_and_test(served, visit):
    page = ready(visit(served.url))
    page.locator("#score-count").fill("10")
    page.locator("#score-start").click()
    page.locator("#score-start:enabled").wait_for()
    right = {name: [answer(served, "path_star", i, name)[2] for i in range(10)] for name in ("one", "two")}
    for name in ("one", "two"):
        cells = page.locator(f"#score-result tr.{name} td").all_inner_texts()
        low, high = wilson_interval(sum(right[name]), 10)
        assert cells[0] == f"{10 * sum(right[name]):.1f} %"
        assert cells[2] == f"{100 * low:.1f} % to {100 * high:.1f} %"
        assert cells[3] == f"{sum(right[name])} of 10"
    p = float(re.search(r"McNemar p = (\S+)", page.locator(".test").inner_text()).group(1))
    expected = mcnemar(right["one"], right["two"])
    assert p == pytest.approx(expected, abs=0.0005) if expected >= 0.001 else p == pytest.approx(expected, rel=0.5)


def test_a_score_can_be_stopped(paced, visit):
    page = ready(visit(paced.url))
    page.locator("#score-pace").select_option("as set")
    page.locator("#score-count").fill("500")
    page.locator("#score-start").click()
    page.locator("#score-result table").wait_for()
    page.locator("#score-stop").click()
    page.locator("#score-start:enabled").wait_for()
    assert "stopped after" in page.locator("#score-state").inner_text()
    assert page.locator("#errors").is_hidden()
    with eventually() as wait:
        wait(lambda: paced.running == 0)


def download(page, button, folder):
    with page.expect_download() as waiting:
        page.locator(button).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_the_exported_event_log_replays_to_the_same_tokens(served, visit, tmp_path):
    page = ready(visit(served.url, accept_downloads=True))
    choose(page, "tree_path", 1)
    race(page)
    path = download(page, "#export-log", tmp_path)
    assert re.fullmatch(r"crsm-tree_path-1-[\dT-]+\.jsonl", path.name)
    generations = read_log(path)
    nano = load_checkpoint("nano")
    assert len(generations) == 2
    for logged, name in zip(generations, ("one", "two"), strict=True):
        text, injections, _ = answer(served, "tree_path", 1, name)
        assert logged.model_hash == nano.weights_hash
        assert sorted(logged.injections) == [injection["position"] for injection in injections]
        engine = Engine(nano, injection_source=lambda _, position, log=logged: log.injections.get(position))
        replayed = engine.generate([GenerationRequest(logged.prompt, logged.sampling, logged.deliberation)])
        assert [token.token for token in replayed] == logged.tokens
        assert nano.tokenizer.decode(logged.tokens[:-1]).strip() == text.strip()


def test_the_exported_trace_has_every_token_in_order(served, visit, tmp_path):
    page = ready(visit(served.url, accept_downloads=True))
    race(page)
    trace = json.loads(download(page, "#export-trace", tmp_path).read_text())
    for pid, name in ((1, "one"), (2, "two")):
        text, injections, _ = answer(served, "path_star", 0, name)
        slices = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == pid]
        assert [event["name"] for event in slices] == text.split()
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(slices, slices[1:], strict=False))
        instants = [event["name"] for event in trace["traceEvents"] if event["ph"] == "i" and event["pid"] == pid]
        assert instants.count("on time") == len(injections)
    assert trace["otherData"]["problem"] == "path_star 0"


# ------------------------------------------------------------------------------------------------- for everyone to use

INTERACTIVE = {"button", "combobox", "textbox", "spinbutton", "slider", "link", "DisclosureTriangle", "searchbox"}


def test_every_control_has_a_name(served, visit):
    page = ready(visit(served.url))
    race(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.evaluate("document.querySelectorAll('[hidden]').forEach((each) => (each.hidden = false))")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in tree if node.get("role", {}).get("value") in INTERACTIVE and not node["ignored"]]
    assert len(controls) >= 25
    assert [node for node in controls if not node.get("name", {}).get("value", "").strip()] == []
    # Drawings are images with a description, and every landmark of a kind can be told apart.
    assert page.locator("main svg[role='img']:not([aria-label])").count() == 0
    assert (page.locator("main").count(), page.locator("h1").count()) == (1, 1)


def test_the_first_key_leads_past_the_controls_to_the_race(served, visit):
    page = ready(visit(served.url))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the race"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "race"


def test_a_race_needs_no_pointer(served, visit):
    page = ready(visit(served.url))
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    page.keyboard.press("Enter")
    over(page)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('injected')"):
            break
    assert page.locator("#tooltip").is_visible()


@pytest.mark.parametrize("width", [360, 768, 1024, 1920])
def test_nothing_is_wider_than_the_window(served, visit, width):
    page = ready(visit(served.url, viewport={"width": width, "height": 740}))
    race(page)
    page.locator("#score-count").fill("3")
    page.locator("#score-start").click()
    page.locator("#score-start:enabled").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#start").bounding_box()["height"] >= 32


def test_a_finger_shows_what_a_pointer_does(served, visit):
    page = ready(visit(served.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True))
    race(page)
    page.locator("#two-said .injected").first.tap()
    page.wait_for_timeout(400)
    box = page.locator("#tooltip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] >= 0
    assert page.locator("#tooltip tbody tr").count() == 4


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => { for (; node; node = node.parentElement) {
    const found = rgb(getComputedStyle(node).backgroundColor); if (found[3] === 255) return found; } return [255, 255, 255]; };
  const low = [];
  for (const node of document.querySelectorAll("h1, h2, p, label, li, td, th, dt, dd, span, button, output, summary, option, text")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, .hidden, .skip")) continue;
    const style = getComputedStyle(node);
    const colour = rgb(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(ground(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push([node.tagName, node.className.baseVal ?? node.className, node.textContent.slice(0, 20), contrast]);
  }
  return { low, ground: light(ground(document.body)) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(served, visit, scheme):
    page = ready(visit(served.url, color_scheme=scheme))
    race(page)
    page.locator("#two-said .injected").first.focus()
    found = page.evaluate(CONTRASTS)
    assert found["low"] == []
    assert (found["ground"] > 0.5) is (scheme == "light")
    page.locator("#theme").select_option("light" if scheme == "dark" else "dark")
    assert (page.evaluate(CONTRASTS)["ground"] > 0.5) is (scheme == "dark")


def test_nothing_on_the_page_needs_a_looser_content_policy(served, visit):
    page = ready(visit(served.url))
    race(page)
    policy = page.request.get(served.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert page.locator("script:not([src]), [onclick], [onload]").count() == 0
    source = page.request.get(served.url).text()
    assert "style=" not in source and "http" not in source.replace("http-equiv", "")


def test_time_from_first_paint_to_first_token(paced, visit, capsys):
    """A figure, not a claim: the page is loaded, a race begun at once, at the page's own pace."""
    times = []
    for _ in range(3):
        page = visit(paced.url, {})
        page.locator("#start:enabled").click(no_wait_after=True)
        page.locator("#two-said .token").first.wait_for()
        times.append(
            page.evaluate("performance.now() - performance.getEntriesByName('first-contentful-paint')[0].startTime")
            / 1000
        )
    with capsys.disabled():
        print(f"\nfirst paint to first token: {', '.join(f'{seconds:.2f}' for seconds in times)} s")
