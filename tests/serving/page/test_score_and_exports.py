"""The score over many problems, the event log and the trace."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from crsm.engine import Engine
from crsm.evaluation.statistics import mcnemar, wilson_interval
from crsm.event_log import read_log
from crsm.generation import GenerationRequest
from crsm.model import load_checkpoint
from tests.serving.page.visiting import answer, choose, eventually, race, ready

pytestmark = pytest.mark.browser


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


def test_a_full_server_costs_a_score_no_problem(served, visit):
    page = ready(visit(served.url, may_fail=True))
    asked = []

    def refuse_every_third(route):
        asked.append(route.request.url)
        if len(asked) % 3:
            route.continue_()
        else:
            route.fulfill(status=429, headers={"Retry-After": "0"}, json={"error": {"message": "full"}})

    page.route(re.compile(r"/v1/(completions|crsm/problems)"), refuse_every_third)
    page.locator("#score-count").fill("6")
    page.locator("#score-start").click()
    page.locator("#score-start:enabled").wait_for()
    assert page.locator("#errors").is_hidden()
    right = sum(answer(served, "path_star", i, "two")[2] for i in range(6))
    assert page.locator("#score-result tr.two td").all_inner_texts()[3] == f"{right} of 6"
    assert {int(url.split("=")[1]) for url in asked if "problems" in url} == set(range(6))


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
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(slices))
        instants = [event["name"] for event in trace["traceEvents"] if event["ph"] == "i" and event["pid"] == pid]
        assert instants.count("on time") == len(injections)
    assert trace["otherData"]["problem"] == "path_star 0"
