"""The page's modules by themselves: parsing, the state of a race, layouts, statistics, exports."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actors.serving
from crsm.evaluation.statistics import mcnemar, wilson_interval
from tests.serving.page.page_server import chromium

pytestmark = pytest.mark.browser

PAGE = Path(actors.serving.__file__).parent / "page"
FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def module():
    """Calls ``(m, argument) => …`` with a module of the page."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=PAGE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with chromium() as browser:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/icon.svg")

        def call(name, function, argument=None):
            script = f"async (argument) => ({function})(await import('/{name}.js'), argument)"
            return page.evaluate(script, argument)

        yield call
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------- server-sent events

PARSE = "(m, pieces) => { const p = new m.EventParser(); return pieces.flatMap((piece) => p.push(piece)); }"


def test_events_end_at_an_empty_line_whatever_the_line_ends(module):
    text = 'data: {"a": 1}\n\n: a comment\nevent: x\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\n'
    assert module("sse", PARSE, [text]) == ['{"a": 1}', "two\nlines", "[DONE]"]


def test_an_event_without_its_end_is_not_handed_out(module):
    assert module("sse", PARSE, ["data: half\n"]) == []


@FEW
@given(st.data())
def test_events_do_not_depend_on_where_the_text_is_cut(module, data):
    text = 'data: a b\n\ndata: {"x": "é\\n"}\r\n\r\n: c\n\ndata: 1\ndata: 2\n\ndata: [DONE]\r\n\r\n'
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert module("sse", PARSE, pieces) == module("sse", PARSE, [text])


# --------------------------------------------------------------------------------------------------------- statistics


def test_intervals_are_those_of_the_library(module):
    cases = [(k, n) for n in (1, 2, 7, 50, 500) for k in sorted({0, 1, n // 3, n - 1, n})]
    found = module("statistics", "(m, cases) => cases.map(([k, n]) => m.wilson(k, n))", cases)
    for (k, n), interval in zip(cases, found, strict=True):
        assert interval == pytest.approx(wilson_interval(k, n), abs=1e-14)


def test_an_interval_of_no_trials_is_an_error(module):
    with pytest.raises(Exception, match="trials = 0; allowed"):
        module("statistics", "(m) => m.wilson(0, 0)")


def test_p_values_are_those_of_the_library(module):
    cases = [(0, 0), (0, 1), (1, 0), (3, 3), (0, 20), (5, 40), (321, 0), (400, 600), (0, 1000)]
    found = module("statistics", "(m, cases) => cases.map(([a, b]) => m.mcnemar(a, b))", cases)
    for (a, b), p in zip(cases, found, strict=True):
        assert p == pytest.approx(mcnemar([1] * a + [0] * b + [1], [0] * a + [1] * b + [1]), rel=1e-12)


# --------------------------------------------------------------------------------------------------- state of a race


def chunk(text="", tokens=(), events=(), log=(), finish=None, verdict=None, t=0.5):
    notes = {"events": list(events), "tokens": list(tokens), "t": t, "log": list(log)}
    if finish:
        notes |= {"finish": finish, "verdict": verdict, "state": None}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "crsm": notes}


def token(position, text, injected=False):
    return {"position": position, "id": position, "text": text, "logprob": -0.1, "injected": injected}


def request(number, position, target):
    return {"type": "crsm.request", "t": 0.1, "request": number, "position": position, "target": target, "lag": 2}


def plan(number, position, target, gain=0.4):
    return request(number, position, target) | {
        "type": "crsm.plan",
        "value_now": 0.5,
        "value_planned": 0.5 + gain,
        "line": "4 28",
        "line_tokens": [4, 28],
        "assumed": "path 3",
        "simulations": 64,
        "seconds": 0.002,
        "planner": "",
        "gates": [1.0],
    }


def inject(number, position, target, late=0, gain=0.4):
    return plan(number, position, target, gain) | {
        "type": "crsm.inject",
        "late": late,
        "reason": "late" if late else "on_time",
        "alpha": [0.05],
        "policy_weight": 0.0,
    }


def reject(number, target, reason):
    return request(number, target, target) | {"type": "crsm.reject", "reason": reason}


FOLD = """(m, actions) => {
  let race = m.newRace("1 2 =", null, {}, "nano");
  for (const action of actions) race = m.reduce(race, "two", action);
  const two = race.systems.two;
  const tokens = two.end ? [...two.tokens, two.end] : two.tokens;
  return { two, one: race.systems.one.status, counts: m.planCounts(two), resting: m.restingRequest(two)?.id ?? null,
    behind: tokens.map((token) => m.requestBehind(two, token)?.id ?? null), reasons: two.requests.map(m.reasonOf) };
}"""


def fold(module, *chunks, end="done"):
    actions = [{"type": "sent", "at": 1000}]
    actions += [{"type": "chunk", "chunk": each, "at": 1000 + 250 * (i + 1)} for i, each in enumerate(chunks)]
    return module("race", FOLD, [*actions, {"type": end, "message": "broken"}])


STORY = (
    chunk("the", [token(3, "the")], [request(1, 3, 5)], log=["{}"]),
    chunk(" path", [token(4, " path")], [request(2, 4, 6), plan(1, 4, 5)]),
    chunk(" 3", [token(5, " 3")], [plan(2, 5, 6, gain=0.1), request(3, 5, 7)]),
    chunk(" 4", [token(6, " 4", injected=True)], [inject(1, 5, 5), reject(None, 8, "declined")]),
    chunk("", [], [inject(2, 6, 6, gain=0.1), reject(3, 7, "ended")], finish="stop", verdict="yes", log=["{}"]),
)


def test_a_race_ends_with_every_request_settled(module):
    found = fold(module, *STORY)
    assert found["two"]["status"] == "done" and found["one"] == "waiting"
    assert found["two"]["text"] == "the path 3 4"
    assert found["reasons"] == ["on_time", "on_time", "ended", "declined"]
    assert found["counts"] == {"asked": 4, "settled": 4, "hits": 2, "written": 2}
    assert found["two"]["log"] == ["{}", "{}"] and found["two"]["finish"] == "stop"


def test_a_token_is_shaped_by_the_plan_written_right_before(module):
    assert fold(module, *STORY)["behind"] == [None, None, None, 1, 2]


def test_the_verdict_of_the_model_closes_the_tokens(module):
    assert fold(module, *STORY)["two"]["end"] == {"position": 7, "text": "yes", "injected": True}


def test_the_latest_plan_is_shown_until_all_is_said_and_then_the_one_that_promised_most(module):
    actions = [{"type": "chunk", "chunk": each, "at": 0} for each in STORY]
    assert module("race", FOLD, actions)["resting"] == 2
    assert fold(module, *STORY)["resting"] == 1


def test_what_comes_after_the_end_changes_nothing(module):
    found = fold(module, STORY[0], end="cancelled")
    more = module(
        "race",
        FOLD,
        [
            {"type": "chunk", "chunk": STORY[0], "at": 0},
            {"type": "cancelled"},
            {"type": "chunk", "chunk": STORY[1], "at": 1},
            {"type": "done"},
        ],
    )
    assert found["two"]["status"] == more["two"]["status"] == "cancelled"
    assert more["two"]["text"] == "the"


def test_an_event_of_an_unknown_type_is_passed_over(module):
    found = fold(module, chunk("the", [token(3, "the")], [{"type": "crsm.new", "request": 1}]))
    assert found["two"]["text"] == "the" and found["two"]["requests"] == []


def test_a_failure_keeps_what_was_said(module):
    found = fold(module, STORY[0], end="failed")
    assert (found["two"]["status"], found["two"]["error"], found["two"]["text"]) == ("failed", "broken", "the")


# ------------------------------------------------------------------------------------------------------------ layouts

trees = st.recursive(st.just([]), lambda below: st.lists(below, max_size=4), max_leaves=20)


@FEW
@given(trees)
def test_siblings_do_not_cross_and_parents_stand_between_their_children(module, tree):
    found = module("layout", "(m, tree) => m.tidyTree(tree, (node) => node)", tree)
    placed = found["placed"]
    children = {i: [j for j, item in enumerate(placed) if item["parent"] == i] for i in range(len(placed))}
    leaves = [placed[i]["row"] for i in children if not children[i]]
    assert leaves == list(range(found["rows"]))
    for i, below in children.items():
        rows = [placed[j]["row"] for j in below]
        assert rows == sorted(set(rows))
        if rows:
            assert placed[i]["row"] == (rows[0] + rows[-1]) / 2
        assert all(placed[j]["depth"] == placed[i]["depth"] + 1 for j in below)


@FEW
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=25))
def test_no_two_intervals_of_a_lane_meet(module, pairs):
    intervals = sorted([start, start + length] for start, length in pairs)
    lanes = module("layout", "(m, intervals) => m.packLanes(intervals)", intervals)
    for lane in set(lanes):
        mine = [interval for interval, each in zip(intervals, lanes, strict=True) if each == lane]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(mine))


def test_a_timeline_has_a_column_for_every_position_up_to_the_last_target(module):
    actions = [{"type": "chunk", "chunk": each, "at": 0} for each in STORY[:3]]
    fold_two = "race = m.reduce(race, 'two', action)"
    function = f"""async (m, actions) => {{
      const r = await import("/race.js"); let race = r.newRace("", null, {{}}, "");
      for (const action of actions) {fold_two.replace("m.", "r.")};
      return m.layoutTimeline(race.systems.two);
    }}"""
    found = module("timeline", function, actions)
    assert [column["position"] for column in found["columns"]] == [3, 4, 5, 6, 7]
    assert [(span["from"], span["to"], span["lane"]) for span in found["spans"]] == [(3, 5, 0), (4, 6, 1), (5, 7, 2)]


def node(token, visits, *children):
    return {
        "token": token,
        "text": str(token),
        "visits": visits,
        "value": 0.5,
        "prior": 0.1,
        "children": list(children),
    }


def test_pruning_keeps_the_most_visited_nodes_with_their_parents(module):
    tree = node(None, 10, node(1, 6, node(2, 5), node(3, 1)), node(4, 3, node(5, 2)), node(6, 0))
    function = """(m, tree) => {
      const { root, kept, total } = m.prune(tree, [1, 2], 4);
      const keys = (node) => [node.key + (node.principal ? "*" : ""), ...node.children.flatMap(keys)];
      return [keys(root), kept, total];
    }"""
    assert module("tree", function, tree) == [["*", "1*", "1.2*", "4"], 4, 6]


GRAPH = {"edges": [[3, 4], [4, 28], [3, 8], [8, 5]], "start": 3, "goal": 28, "path": [3, 4, 28], "routes": []}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("the path 3 4 28", [("4", True, True, False), ("28", True, True, False)]),
        ("the path 3 8 5", [("8", True, False, True), ("5", True, False, False)]),
        ("3 28", [("28", False, False, True)]),
        ("3 8 28", [("8", True, False, True), ("28", False, False, True)]),
        ("8 5", [("5", True, False, True)]),
        ("the path 3", []),
        ("", []),
    ],
)
def test_steps_of_an_answer_are_right_until_the_first_wrong_turn(module, text, steps):
    found = module("graph", "(m, [text, data]) => m.stepsOf(text, data).steps", [text, GRAPH])
    assert [(step["to"], step["isEdge"], step["right"], step["wrongTurn"]) for step in found] == steps


def test_every_node_of_a_graph_has_a_place_of_its_own(module):
    data = GRAPH | {"edges": [*GRAPH["edges"], [5, 3], [40, 41]]}  # a way back, and an island
    found = module("graph", "(m, data) => [...m.layoutGraph(data).nodes].map(([n, p]) => [n, p.column, p.row])", data)
    assert {name for name, _, _ in found} == {"3", "4", "28", "8", "5", "40", "41"}
    assert len({(column, row) for _, column, row in found}) == 7


# ----------------------------------------------------------------------------------------------- requests and exports


def test_system_1_is_the_same_request_with_the_channel_off(module):
    settings = {"lag": 2, "injection_rate": 0.05, "simulations": 64, "hypotheses": 1, "channel": "state"}
    settings |= {"pace": 4, "temperature": 0, "max_tokens": 16, "seed": 0}
    function = """(m, settings) =>
      ["one", "two"].map((name) => m.completionBody(name, { model: "nano", prompt: "p", settings }))"""
    one, two = module("request", function, settings)
    assert two["crsm"] == {"lag": 2, "injection_rate": 0.05, "simulations": 64, "hypotheses": 1} | {
        "channel": "state",
        "pace": 4,
    }
    assert one["crsm"] == two["crsm"] | {"channel": "off", "injection_rate": 0}
    assert one | {"crsm": 0} == two | {"crsm": 0}
    unpaced = module("request", function, settings | {"pace": 0})[1]
    assert "pace" not in unpaced["crsm"]


def trace(module, *chunks):
    function = """async (m, actions) => {
      const r = await import("/race.js"); let race = r.newRace("1 2 =", null, {}, "nano");
      for (const action of actions) race = r.reduce(race, "two", action);
      return JSON.stringify(m.chromeTrace(race));
    }"""
    actions = [{"type": "sent", "at": 1000}]
    actions += [{"type": "chunk", "chunk": each, "at": 1000 + 250 * (i + 1)} for i, each in enumerate(chunks)]
    return json.loads(module("export", function, actions))


def test_a_trace_has_a_slice_for_every_token_and_a_pair_for_every_request(module):
    events = trace(module, *STORY)["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["the", "path", "3", "4"]
    begun = {event["id"]: event for event in events if event["ph"] == "b"}
    ended = {event["id"]: event for event in events if event["ph"] == "e"}
    assert begun.keys() == ended.keys() == {"1", "2", "3"}
    assert all(ended[name]["ts"] >= begun[name]["ts"] for name in begun)
    assert [event["name"] for event in events if event["ph"] == "i"] == ["on time", "on time", "ended", "declined"]


def test_tokens_that_came_together_share_their_time(module):
    both = chunk("the path", [token(3, "the"), token(4, " path")], t=0.4)
    slices = [event for event in trace(module, both)["traceEvents"] if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in slices] == [(0, 200_000), (200_000, 200_000)]


def test_numbers_have_no_negative_zero(module):
    found = module("dom", "(m, values) => values.map((value) => m.number(value))", [-0.001, -0.01, 0.0, 1.005, None])
    assert found == ["0.00", "-0.01", "0.00", "1.00", "–"]
