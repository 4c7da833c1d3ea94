"""Fault injection: schedules that repeat, plans that are bad as announced, and a checker that can fail."""

import collections
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cluster import start_ray
from crsm.config import SamplingConfig
from crsm.delta_buffer import check_plan
from crsm.model import save_checkpoint
from crsm.types import Injection, Reason, Token
from jobs import chaos
from jobs.command import invoke
from jobs.faults.campaign import system_1
from jobs.faults.corruption import GOOD, corrupt, mark, marked
from jobs.faults.growth import fit_growth, thin
from jobs.faults.invariants import Record, Rules, check_generation, check_settled
from jobs.faults.planner import Ledger, claim, claimed, read_ledger, start_clock, started_at
from jobs.faults.processes import Process, actors_of, is_running, memory_of, shared_memory_of, wait_until_gone
from jobs.faults.recovery import Sample, calm_rate, rate_between, recovery_seconds, sample
from jobs.faults.schedule import BadPlan, Event, EventKind, fate_of, schedule
from tests.fixtures import PROMPT, a_request, make_plan, tiny_checkpoint

SECONDS = st.floats(1, 600)

# ------------------------------------------------------------------------------------------------ schedule


@given(st.integers(0, 99), SECONDS)
def test_a_schedule_follows_from_seed_and_seconds_and_its_calm_is_calm(seed, seconds):
    phases = schedule(seed, seconds)
    assert phases == schedule(seed, seconds)
    assert sum(phase.seconds for phase in phases) == pytest.approx(seconds)
    assert [phase.paced for phase in phases] == [True, False][: len(phases)]
    for phase in phases:
        assert list(phase.events) == sorted(phase.events, key=lambda event: (event.at, event.kind.value))
        assert phase.calm
        for event in phase.events:
            assert 0 <= event.at and event.at + event.seconds <= phase.seconds * (1 + 1e-9)
            for start, end in phase.calm:
                assert event.at + event.seconds <= start * (1 + 1e-9) or event.at >= end
        for kind in EventKind:
            assert [event.number for event in phase.of(kind)] == list(range(len(phase.of(kind))))


def test_two_minutes_hold_at_least_twenty_kills_and_everything_else_twice():
    counts = collections.Counter(event.kind for phase in schedule(1, 120) for event in phase.events)
    assert counts[EventKind.KILL] >= 20
    assert set(counts) == set(EventKind) and min(counts.values()) >= 2
    assert [phase.seconds for phase in schedule(1, 120)] == pytest.approx([80, 40])


def test_another_seed_is_another_schedule_and_no_time_at_all_is_refused():
    assert schedule(1, 60) != schedule(2, 60)
    with pytest.raises(ValueError, match=r"seconds = 0; allowed: more than 0"):
        schedule(1, 0)


def test_fates_depend_on_seed_and_request_alone_and_are_all_equally_likely():
    fates = [fate_of(3, request) for request in range(14_000)]
    assert fates == [fate_of(3, request) for request in range(14_000)]
    assert fates[:100] != [fate_of(4, request) for request in range(100)]
    counts = collections.Counter(fates)
    assert counts[None] == pytest.approx(2800, abs=300)
    assert all(counts[kind] == pytest.approx(800, abs=140) for kind in BadPlan)
    assert all(fate_of(3, request, share=0) is None for request in range(100))


# ------------------------------------------------------------------------------------------------ bad plans

FOREIGN = {"generation_id", "position", "target", "request_id"}


@pytest.mark.parametrize("fate", BadPlan)
@given(seed=st.integers(0, 10**6))
def test_a_bad_plan_is_bad_as_announced_and_a_sound_one_is_sound(fate, seed):
    checkpoint = tiny_checkpoint()
    sizes, rank = checkpoint.config.model.backbone, checkpoint.config.model.writer.rank
    plan = make_plan(a_request(lag=1, generation_id="mine"), checkpoint, assumed=(20,))
    before = plan.write_u_LRE.copy()
    bad = mark(corrupt(plan, fate, sizes.vocab_size, ["mine", "other"], random.Random(seed)), fate)
    assert marked(bad.planner_id) is fate
    assert np.array_equal(plan.write_u_LRE, before), "the original is untouched"
    changed = {name for name in FOREIGN if getattr(bad, name) != getattr(plan, name)}
    malformed = check_plan(bad, sizes, rank)
    expected = {
        BadPlan.GENERATION: {"generation_id"},
        BadPlan.POSITION: {"position", "target"},
        BadPlan.TARGET: {"target"},
        BadPlan.UNKNOWN: {"request_id"},
    }
    assert changed == expected.get(fate, set())
    assert (bad.model_version != plan.model_version) is (fate is BadPlan.VERSION)
    form = {BadPlan.NAN: "NaN", BadPlan.INFINITY: "NaN", BadPlan.VOCABULARY: "vocabulary", BadPlan.SHAPE: "shape"}
    form[BadPlan.CONFIDENCE] = "confidence_L"
    # Whoever has no other fault must be bad by its form, and by that alone; the others look well.
    assert (malformed is None) is (fate not in form)
    assert form.get(fate, "") in (malformed.message if malformed else "")


def test_numbers_that_travel_as_bits_of_bfloat16_are_spoiled_as_such():
    plan = make_plan(a_request(), tiny_checkpoint())
    bits = np.zeros(plan.write_u_LRE.shape, np.uint16)
    packed = dataclasses.replace(plan, write_u_LRE=bits, write_b_LRN=bits, confidence_L=bits, value_plan_L=bits)
    packed = dataclasses.replace(packed, policy_probs_A=bits)
    found = set()
    for seed in range(50):
        bad = corrupt(packed, BadPlan.NAN, 31, [], random.Random(seed))
        for name in ("write_u_LRE", "write_b_LRN", "confidence_L", "value_plan_L", "policy_probs_A"):
            widened = getattr(bad, name).astype(np.uint32) << 16
            if np.isnan(widened.view(np.float32)).any():
                found.add(name)
    assert len(found) == 5


def test_a_plan_without_a_note_is_told_from_a_good_one():
    plan = make_plan(a_request(), tiny_checkpoint())
    assert marked(mark(plan, None).planner_id) is None
    with pytest.raises(ValueError, match="by hand"):
        marked(plan.planner_id)


def test_deeds_and_orders_outlive_the_planner_that_did_them(tmp_path):
    first, second = Ledger(tmp_path, 1), Ledger(tmp_path, 2)
    first.write(collections.Counter({BadPlan.NAN: 2}))
    second.write(collections.Counter({BadPlan.NAN: 1, BadPlan.LOST: 3}))
    with open(tmp_path / "deeds-3-0", "w", encoding="utf-8") as file:
        file.write("shape\nsha")  # killed while writing
    assert read_ledger(tmp_path) == {BadPlan.NAN: 3, BadPlan.LOST: 3, BadPlan.SHAPE: 1}
    order = Event(1.0, EventKind.KILL, number=4)
    assert [claim(tmp_path, order), claim(tmp_path, order)] == [True, False]
    assert claim(tmp_path, dataclasses.replace(order, number=5))
    assert len(claimed(tmp_path, EventKind.KILL)) == 2 and not claimed(tmp_path, EventKind.SLEEP)
    assert started_at(tmp_path) is None
    start_clock(tmp_path, 12.5)
    assert started_at(tmp_path) == 12.5


# ------------------------------------------------------------------------------------------------ the checker

SYSTEM_1 = (11, 12, 13, 14, 15, 16)
RULES = Rules(max_lag=2, max_tokens=6, model_version=3, reference=lambda prompt: SYSTEM_1)
FIRST = len(PROMPT)


def a_plan(*, position=FIRST, line=(14, 15), assumed=(12, 13), note=GOOD, **changes):
    """Asked for with the first token known, made for the third; System 1's own tokens are its line."""
    request = a_request(generation_id="mine", position=position, lag=len(assumed))
    plan = make_plan(request, tiny_checkpoint(), assumed=assumed, line=line)
    return dataclasses.replace(plan, **({"planner_id": f"planner-0:{note}"} | changes))


def a_record(said=SYSTEM_1, plan=None, at=FIRST + 2, **changes):
    """What a client of a well-behaved generator saw: a plan is written before ``at``, heard from ``at + 1`` on."""
    tokens = [
        Token("mine", FIRST + index, token, -0.5, index == len(said) - 1, "length" if index == len(said) - 1 else None)
        for index, token in enumerate(said)
    ]
    if plan is not None:
        index = at + 1 - FIRST
        tokens[index] = tokens[index]._replace(injection=Injection(plan, at, (0.5, 0.5)))
    return Record("mine", PROMPT, tokens, **changes)


def the_one(record, rules=RULES):
    """The only violation."""
    found = check_generation(record, rules)
    assert len(found) == 1, found
    assert found[0].startswith("generation mine: ")
    return found[0]


def cancelled(record, count):
    """The same, cancelled after so many tokens."""
    kept = record.tokens[:count]
    last = kept[-1].position if kept else FIRST - 1
    return dataclasses.replace(record, tokens=[*kept, Token("mine", last, -1, 0.0, True, "cancelled")])


@pytest.mark.parametrize(
    "record",
    [
        a_record(),
        a_record(plan=a_plan()),
        a_record(plan=a_plan(), at=FIRST + 3),
        a_record((11, 12, 13, 14, 15, 29), a_plan(), at=FIRST + 3),
        a_record((11, 12, 13, 28, 29, 27), a_plan(line=(28, 29))),
        a_record(plan=a_plan(note="delayed")),
        a_record(plan=a_plan(note="duplicated")),
        cancelled(a_record(asked_to_cancel=True), 3),
        cancelled(a_record(asked_to_cancel=True), 0),
    ],
    ids=[
        "no plan",
        "on time",
        "late",
        "late, then another text",
        "the plan's text",
        "delayed",
        "twice",
        "cut",
        "early",
    ],
)
def test_what_is_right_is_no_violation(record):
    assert check_generation(record, RULES) == []


def without(record, index):
    return dataclasses.replace(record, tokens=[*record.tokens[:index], *record.tokens[index + 1 :]])


def test_a_lost_token_is_found():
    assert "a token was lost" in check_generation(without(a_record(), 2), RULES)[0]
    assert "no token is the last" in check_generation(without(a_record(), 5), RULES)[0]
    assert "no token is the last" in check_generation(Record("mine", PROMPT), RULES)[0]


def test_a_duplicated_token_is_found():
    record = a_record()
    record.tokens.insert(2, record.tokens[1])
    assert "a token was duplicated" in check_generation(record, RULES)[0]
    record = a_record()
    record.tokens.append(record.tokens[-1])
    found = check_generation(record, RULES)
    assert any("a token was duplicated" in message for message in found)
    assert any("2 tokens are the last" in message for message in found)


def test_tokens_after_the_end_and_too_many_of_them_are_found():
    record = a_record((*SYSTEM_1, 17))
    record.tokens[5] = record.tokens[5]._replace(finished=True, finish_reason="stop")
    record.tokens[6] = record.tokens[6]._replace(finished=False, finish_reason=None)
    found = check_generation(record, RULES)
    assert any("1 tokens after the last" in message for message in found)
    assert any("7 tokens; allowed: 6" in message for message in found)


def test_an_end_without_a_reason_is_found():
    record = a_record()
    record.tokens[-1] = record.tokens[-1]._replace(finish_reason=None)
    assert "without a reason" in the_one(record)


def test_a_token_of_another_generation_is_found():
    record = a_record()
    record.tokens[3] = record.tokens[3]._replace(generation_id="other")
    assert the_one(record).endswith("names generation other")


def test_a_broken_stream_and_a_cancellation_that_nobody_asked_for_are_found():
    assert the_one(a_record(error="ActorDiedError")) == "generation mine: the stream broke off: ActorDiedError"
    assert "nobody asked" in the_one(cancelled(a_record(), 3))


def test_a_plan_of_another_generation_is_found():
    assert "is one of generation other" in the_one(a_record(plan=a_plan(generation_id="other")))


def test_a_plan_at_a_wrong_position_is_found():
    plan = a_plan()
    early = a_record(plan=plan, at=FIRST + 1)
    assert any(f"was made for {FIRST + 2}" in message for message in check_generation(early, RULES))
    strict = dataclasses.replace(RULES, max_lag=0)
    assert "allowed: up to 0 later" in the_one(a_record(plan=plan, at=FIRST + 3), strict)
    record = a_record(plan=plan)
    moved = record.tokens[3]._replace(injection=None)
    record.tokens[4] = record.tokens[4]._replace(injection=record.tokens[3].injection)
    record.tokens[3] = moved
    assert "came with the token at" in the_one(record)


def test_a_plan_for_another_text_is_found():
    assert f"expected token 29 at {FIRST + 2}, where 13 was said" in the_one(a_record(plan=a_plan(assumed=(12, 29))))
    late = a_record(plan=a_plan(line=(29, 15)), at=FIRST + 3)
    assert f"expected token 29 at {FIRST + 3}, where 14 was said" in the_one(late)
    assert "assumed 1 tokens for a lag of 2" in the_one(
        a_record(plan=a_plan(target=FIRST + 2, assumed=(12,), line=(13,)))
    )
    assert "inside the prompt" in the_one(a_record(plan=a_plan(position=FIRST - 1, assumed=(11, 12, 13))))


def test_a_plan_of_an_old_version_is_found():
    assert "is of version 2; allowed: 3" in the_one(a_record(plan=a_plan(model_version=2)))


@pytest.mark.parametrize("fate", [fate for fate in BadPlan if not fate.is_sound])
def test_a_bad_plan_that_was_applied_is_found(fate):
    assert f"was a bad one ({fate.value})" in the_one(a_record(plan=a_plan(note=fate.value)))


def test_a_plan_that_was_applied_twice_is_found():
    record = a_record(plan=a_plan())
    again = Injection(a_plan(), FIRST + 3, (0.5, 0.5))
    record.tokens[4] = record.tokens[4]._replace(injection=again)
    assert "was applied before" in the_one(record)


def test_a_text_that_is_not_system_1s_though_no_plan_was_applied_is_found():
    assert f"token 29 at {FIRST + 1}, where System 1 says 12" in the_one(a_record((11, 29, 13, 14, 15, 16)))
    assert "ended after 3 tokens, where System 1 says 6" in the_one(a_record(SYSTEM_1[:3]))
    longer = dataclasses.replace(RULES, max_tokens=9)
    assert "where System 1 ends after 6" in the_one(a_record((*SYSTEM_1, 17)), longer)
    before_the_plan = a_record((11, 29, 13, 14, 15, 16), a_plan(assumed=(29, 13)))
    assert f"token 29 at {FIRST + 1}" in the_one(before_the_plan)


def test_two_tokens_that_system_1_likes_equally_well_are_no_violation():
    tied = dataclasses.replace(RULES, tied=lambda text, one, other: (text, one, other) == ((*PROMPT, 11), 29, 12))
    assert check_generation(a_record((11, 29, 13, 14, 15, 16)), tied) == []
    assert check_generation(a_record((11, 12, 29, 14, 15, 16)), tied) != []


def test_the_reference_is_what_a_plain_backbone_says_and_ties_are_told_by_its_logits():
    checkpoint = tiny_checkpoint()
    rules = system_1(checkpoint, SamplingConfig(max_tokens=5), max_lag=8)
    said = rules.reference(PROMPT)
    assert len(said) == 5 and (rules.max_tokens, rules.model_version) == (5, 3)
    assert not rules.tied(PROMPT, said[0], said[0] - 1) and rules.tied(PROMPT, said[0], said[0])


def test_every_request_must_be_settled_exactly_once():
    assert check_settled({"requests": 5, "outcomes": {"on_time": 3, "lost": 2}}) == []
    assert check_settled({"requests": 5, "outcomes": {"on_time": 3, "lost": 2, "declined": 4}}) == []
    assert check_settled({"requests": 9, "outcomes": {"on_time": 3, "lost": 2, "declined": 4}}) == []
    for requests in (4, 6):
        assert "5 outcomes" in check_settled({"requests": requests, "outcomes": {"on_time": 3, "lost": 2}})[0]


# ------------------------------------------------------------------------------------------------ recovery


def history(rate, seconds=20.0, step=0.25, requests=100):
    """Samples of a generator that settles so many requests a second, of which the share ``rate(time)`` hit."""
    samples, hits, misses = [], 0.0, 0.0
    for index in range(int(seconds / step) + 1):
        now = index * step
        samples.append(Sample(now, round(hits), round(misses)))
        hits += requests * step * rate(now)
        misses += requests * step * (1 - rate(now))
    return samples


def test_a_rate_is_of_what_was_settled_in_its_time():
    samples = history(lambda now: 0.5 if now < 10 else 0.9)
    assert rate_between(samples, 0, 10) == pytest.approx(0.5, abs=0.01)
    assert rate_between(samples, 12, 16) == pytest.approx(0.9, abs=0.01)
    assert calm_rate(samples, [(1, 3), (12, 14), (15, 17)]) == pytest.approx(0.9, abs=0.01)
    assert rate_between(samples, 3, 3.1) is None and rate_between(samples, 30, 40) is None
    assert calm_rate([], [(0, 1)]) is None


def test_plans_that_were_made_bad_count_neither_way_and_what_was_declined_is_a_miss():
    outcomes = {"on_time": 3, "late": 1, "shut": 1, "superseded": 1, "stale": 2, "lost": 3, "declined": 4}
    assert sample(7.0, outcomes | {"malformed": 90, "old_version": 9, "ended": 5}) == Sample(7.0, 6, 9)
    assert {reason.value for reason in Reason} >= outcomes.keys()


def test_recovery_is_the_time_until_the_rate_is_back():
    samples = history(lambda now: 0.0 if 5 <= now < 8 else 0.9)
    (seconds,), never = recovery_seconds(samples, [5.0], 0.9, 20.0)
    assert seconds == pytest.approx(3.0, abs=0.25) and never == 0
    assert recovery_seconds(samples, [12.0], 0.9, 20.0) == ([0.0], 0)
    # The second of two waits no shorter than the rest of the first.
    both, _ = recovery_seconds(samples, [5.0, 6.0], 0.9, 20.0)
    assert both == pytest.approx([3.0, 2.0], abs=0.25)


def test_a_rate_that_never_comes_back_is_said_to_have_not():
    samples = history(lambda now: 0.9 if now < 5 else 0.3)
    assert recovery_seconds(samples, [5.0], 0.9, 20.0) == ([15.0], 1)


# ------------------------------------------------------------------------------------------------ growth


@given(st.floats(-5, 5), st.integers(0, 10**6))
def test_growth_is_found_whatever_the_outliers_and_the_warm_up(slope, seed):
    rng = np.random.default_rng(seed)
    times = np.arange(100) * 3.0
    values = 500 + slope * times + rng.normal(0, 1, 100)
    values[:15] -= 400  # still loading
    values[rng.choice(np.arange(20, 100), 12, replace=False)] += rng.choice([-300, 300], 12)
    fit = fit_growth(times.tolist(), values.tolist())
    assert fit.samples == 80 and fit.seconds == pytest.approx(237)
    assert fit.growth == pytest.approx(slope * 237, abs=5)
    assert fit.level == pytest.approx(500 + slope * 60, abs=5)
    assert fit.share == pytest.approx(fit.growth / fit.level)


def test_a_constant_does_not_grow_and_too_few_samples_say_nothing():
    fit = fit_growth([0, 1, 2, 3, 4, 5], [7.0] * 6)
    assert (fit.growth, fit.level, fit.share) == (0.0, 7.0, 0.0)
    assert fit_growth([], []) is None and fit_growth([0, 1, 2], [1.0, 2.0, 3.0]) is None
    with pytest.raises(ValueError, match="2 times and 1 values"):
        fit_growth([0, 1], [1.0])
    with pytest.raises(ValueError, match="ascend"):
        fit_growth([0, 0], [1.0, 1.0])


def test_thinning_keeps_few_samples_evenly():
    times, values = thin(list(range(1000)), list(range(1000)), most=100)
    assert times == values == list(range(0, 1000, 10))
    assert thin([1.0, 2.0], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])


# ------------------------------------------------------------------------------------------------ processes


def test_processes_are_known_by_title_and_start_and_a_dead_one_is_gone(tmp_path):
    shared = "/dev/shm/crsm-test-" + str(os.getpid())
    script = "import sys, time; file = open(sys.argv[1], 'w'); print('up', flush=True); time.sleep(60)"
    titled = ["ray::PoolActor.watch", "-c", script, shared]
    child = subprocess.Popen(titled, executable=sys.executable, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"up\n"
        (process,) = [process for process in actors_of(os.getpid()) if process.pid == child.pid]
        assert (process.actor, process.role) == ("PoolActor", "pool")
        assert is_running(process) and not is_running(dataclasses.replace(process, started=0))
        memory = memory_of(process)
        assert memory.resident > memory.anonymous > 10**6
        assert shared_memory_of(process) == {shared}
        assert wait_until_gone([process], 0.1) == [process]
        child.send_signal(signal.SIGKILL)
        assert wait_until_gone([process], 10) == []  # a zombie: nobody has waited for it
        assert memory_of(process) is None
        assert process not in actors_of(os.getpid())
    finally:
        child.kill()
        child.wait()
        os.unlink(shared)


@pytest.mark.parametrize(
    ("actor", "role"),
    [("OrderedFaultyPlanner", "planner"), ("GeneratorActor", "generator"), ("PoolActor", "pool"), ("Other", "Other")],
)
def test_an_actors_role_is_in_its_name(actor, role):
    assert Process(1, 2, actor).role == role


# ------------------------------------------------------------------------------------------------ the job


@pytest.fixture(scope="module")
def one_ray():
    """The jobs use the Ray that is there."""
    with start_ray("local", num_cpus=4, object_store_memory=chaos.STORE_BYTES):
        yield


@pytest.mark.ray
def test_the_job_finds_no_violation_and_says_what_it_did(one_ray, tmp_path, capsys):
    save_checkpoint(tiny_checkpoint(), tmp_path / "tiny")
    options = ("--checkpoint", str(tmp_path / "tiny"), "--seconds", "6", "--concurrency", "4", "--seed", "7")
    options += ("--pace", "20", "--set", "sampling.max_tokens=12", "--json", "-")
    status = invoke(chaos.main, options)
    found = capsys.readouterr()
    results = json.loads(found.out)["results"]
    assert (status, results["violations"], results["violation_messages"]) == (0, 0, []), found.err
    assert results["planner_kills"] > 0 and sum(results["bad_plans"].values()) > 0
    assert results["bad_plans"].keys() == {kind.value for kind in BadPlan}
    assert results["tokens"] > 100 and results["injections"] > 0
    assert results["requests"] == sum(results["outcomes"].values())
    assert set(results["recovery_seconds"]) == {"median", "max", "unrecovered"}
    assert set(results["hit_rate"]) == {"overall", "calm"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_soak_says_how_every_process_grew(one_ray, tmp_path, capsys):
    save_checkpoint(tiny_checkpoint(), tmp_path / "tiny")
    options = ("--checkpoint", str(tmp_path / "tiny"), "--soak", "0.1", "--concurrency", "4", "--planners", "1")
    status = invoke(chaos.main, (*options, "--pace", "20", "--seed", "3", "--json", "-"))
    results = json.loads(capsys.readouterr().out)["results"]
    assert (status, results["violations"], results["planner_kills"]) == (0, 0, 0)
    assert {name.partition("-")[0] for name in results["growth"]["processes"]} >= {"generator", "planner"}
    assert all(one["own_mb"] > 1 for one in results["growth"]["processes"].values())
    levels = [one["own_mb"] for one in results["growth"]["processes"].values()]
    assert results["growth"]["overall"]["own_mb"] == pytest.approx(sum(levels))
    assert statistics.median(levels) < 10**4 and results["growth"]["overall"]["growth"] is not None
