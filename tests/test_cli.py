"""The command ``crsm``: what it says, what it writes, and one line for every mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crsm.cli import app
from crsm.kernels import select_kernels
from crsm.model import save_checkpoint
from jobs.command import invoke
from tests.fixtures import tiny_checkpoint

ROOT = Path(__file__).parents[1]
PROMPT = "0 1 | 1 2 | / 0 2 ="
SHORT = ("--max-tokens", "6", "--lag", "0", "--rate", "0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(tiny_checkpoint(), path / "tiny")
    save_checkpoint(tiny_checkpoint(seed=1), path / "other")
    save_checkpoint(tiny_checkpoint(calibrated=False), path / "shut")
    return path


@pytest.fixture
def crsm(folder, capsys):
    """Runs the command on the tiny checkpoint: exit status, standard output, standard error."""

    def call(*args):
        args = [str(arg).replace("{}", str(folder)) for arg in args]
        if args[0] in ("generate", "replay", "demo") and "--checkpoint" not in args:
            args += ["--checkpoint", str(folder / "tiny")]
        status = invoke(app, args)
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def results(path):
    return json.loads(Path(path).read_text())["results"]


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_marks_the_tokens_after_a_written_plan(crsm, tmp_path):
    status, out, _ = crsm("generate", PROMPT, *SHORT, "--json", tmp_path / "g.json")
    found = results(tmp_path / "g.json")
    assert status == 0
    words = out.split()
    assert [word.rstrip("*") for word in words] == found["text"].split()
    marked = {place for place, word in enumerate(words) if word.endswith("*")}
    prompt = len(PROMPT.split())
    assert marked == {entry["shapes"] - prompt for entry in found["injections"]}
    assert marked
    assert found["plans"]["injections"] == len(found["injections"])


def test_generate_without_planners_says_so_and_marks_nothing(crsm):
    status, out, err = crsm("generate", PROMPT, *SHORT, "--planners", "0")
    assert status == 0
    assert "zero planners: System 1 alone" in err
    assert "no plans asked for" in err
    assert "*" not in out


def test_shut_gates_are_announced_and_say_what_system_1_says(crsm):
    alone = crsm("generate", PROMPT, *SHORT, "--planners", "0", "--checkpoint", "{}/shut")
    shut = crsm("generate", PROMPT, *SHORT, "--checkpoint", "{}/shut")
    assert "gates of this checkpoint are shut" in shut[2]
    assert shut[1] == alone[1]


def test_verbose_shows_the_line_the_lag_the_value_and_the_gates(crsm):
    _, out, _ = crsm("generate", PROMPT, *SHORT, "--verbose")
    assert re.search(r"plan “.+”, asked 0 tokens ahead, value 0\.\d\d → 0\.\d\d, gates 0\.\d\d 0\.\d\d", out)


def test_generate_reads_standard_input(crsm, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    piped = crsm("generate", "-", *SHORT)
    assert piped[:2] == crsm("generate", PROMPT, *SHORT)[:2]


def test_generate_takes_a_problem_and_judges_the_answer(crsm, tmp_path):
    status, _, err = crsm("generate", "--problem", "path_star:2", *SHORT, "--json", tmp_path / "g.json")
    assert status == 0
    assert "problem: " in err
    assert "the answer is wrong; right: the path" in err
    assert results(tmp_path / "g.json")["correct"] is False


def test_the_same_seed_gives_the_same_text(crsm):
    sampled = ("generate", PROMPT, *SHORT, "--temperature", "1", "--seed")
    assert crsm(*sampled, 3)[1] == crsm(*sampled, 3)[1]
    assert len({crsm(*sampled, seed)[1] for seed in range(4)}) > 1


def test_the_wall_clock_keeps_the_pace(crsm, tmp_path):
    status, _, _ = crsm("generate", PROMPT, *SHORT, "--pace", "50", "--json", tmp_path / "g.json")
    assert status == 0
    assert results(tmp_path / "g.json")["tokens_per_second"] < 55
    assert json.loads((tmp_path / "g.json").read_text())["config"]["engine"]["clock"] == "wall"


# -------------------------------------------------------------------------------------------------------------- replay


def test_a_replay_says_the_same_without_a_planner(crsm, tmp_path):
    log = tmp_path / "logs" / "events.jsonl"
    said = crsm("generate", PROMPT, *SHORT, "--event-log", log)
    status, out, err = crsm("replay", log, "--json", tmp_path / "r.json")
    assert (status, out) == (0, said[1])
    assert "the same as in the log" in err
    assert [entry["identical"] for entry in results(tmp_path / "r.json")["generations"]] == [True]


def test_a_replay_of_a_log_that_was_changed_shows_the_difference(crsm, tmp_path):
    log = tmp_path / "events.jsonl"
    crsm("generate", PROMPT, *SHORT, "--event-log", log)
    lines = log.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"token"' in line and '"event": "token"' in line)
    event = json.loads(lines[place])
    lines[place] = json.dumps(event | {"token": event["token"] ^ 1})
    log.write_text("\n".join(lines) + "\n")
    status, _, err = crsm("replay", log)
    assert status == 1
    assert "difference at position 10: " in err


def test_a_log_that_breaks_off_is_replayed_as_far_as_it_goes(crsm, tmp_path):
    log = tmp_path / "events.jsonl"
    crsm("generate", PROMPT, *SHORT, "--event-log", log)
    lines = log.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"event": "token"' in line)
    log.write_text("\n".join(lines[:last]) + "\n")
    status, out, err = crsm("replay", log)
    assert status == 0
    assert len(out.split()) == 5
    assert "5 tokens" in err


def test_a_replay_refuses_other_weights(crsm, tmp_path):
    log = tmp_path / "events.jsonl"
    crsm("generate", PROMPT, *SHORT, "--event-log", log)
    status, out, err = crsm("replay", log, "--checkpoint", "{}/other")
    assert (status, out) == (2, "")
    assert re.search(r"was written with weights [0-9a-f]{16}; checkpoint '.*other' has [0-9a-f]{16}", err)


# ------------------------------------------------------------------------------------------------------ inspect, demo


def test_inspect_shows_parts_sizes_layers_and_gates(crsm, tmp_path):
    status, out, _ = crsm("inspect", "{}/tiny", "--json", tmp_path / "i.json")
    assert status == 0
    found = results(tmp_path / "i.json")
    model = tiny_checkpoint().model
    assert found["parts"]["together"]["parameters"] == sum(p.numel() for p in model.parameters())
    # Two layers: 4 heads of 8 × 8, and 3 inputs of 48 channels; the request also holds two residual streams of 16.
    state = 4 * 2 * (4 * 8 * 8 + 48 * 3)
    assert found["bytes"]["state of a generation"] == state
    # Beside its state: the write in force, the residual streams, and the decays of the last 8 tokens.
    running = state + 4 * 2 * (4 * 8 * 8 + 16 + 8 * 4)
    assert found["bytes"]["running generation"] == running
    assert found["bytes"]["running generations, 256 at most"] == 256 * running
    assert found["bytes"]["request to a planner, fp32"] == 4 * 2 * (4 * 8 * 8 + 16)
    assert found["bytes"]["request to a planner, bf16"] == 2 * 2 * (4 * 8 * 8 + 16)
    assert sum(found["layers"]["fusion"]) == pytest.approx(1.0)
    for part in ("world_model", "gate slope", "trust horizon", "not measured", select_kernels().NAME, "native core"):
        assert part in out


def test_inspect_compares_message_sizes_with_those_of_public_models(crsm, tmp_path):
    status, out, _ = crsm("inspect", "{}/tiny", "--messages", "--json", tmp_path / "i.json")
    assert status == 0
    sizes = results(tmp_path / "i.json")["messages"]["mamba2-130m"]
    # 24 layers, 24 heads of 64 × 128, d_model 768.
    assert sizes["request, 4 layers"] == {"fp32": 4 * (24 * 768 + 4 * 24 * 64 * 128), "bf16": 3_219_456 // 2}
    assert "| mamba2-130m | 19,390,464 | 18,948,096 |" in out


@pytest.mark.serial
def test_the_demo_ends_in_a_table_and_a_picture(crsm, tmp_path):
    picture = tmp_path / "demo" / "demo.png"
    options = (
        "--threads",
        "--problems",
        "3",
        "--pace",
        "10",
        "--set",
        "sampling.max_tokens=6",
        "--set",
        "deliberation.lag=0",
    )
    status, out, err = crsm("demo", *options, "--figure", picture, "--json", tmp_path / "d.json")
    assert status == 0, err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "path_star" in out
    assert "by the wall clock" in err
    found = results(tmp_path / "d.json")
    assert found["planners"] == "threads"
    assert found["tasks"]["path_star"]["problems"] == 3
    assert found["wall_clock"]["interval"]["system2"] == pytest.approx(0.1, rel=0.25)


def test_a_demo_with_shut_gates_does_not_claim_success(crsm, tmp_path):
    options = ("--threads", "--problems", "2", "--pace", "200", "--set", "sampling.max_tokens=3")
    status, _, err = crsm("demo", *options, "--checkpoint", "{}/shut", "--figure", tmp_path / "demo.png")
    assert status == 1
    assert "no plan was written" in err


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["generate", "0 häuser 1"], r"prompt: unknown word 'häuser'; allowed: .*0…7"),
        (["generate", ""], "prompt is empty; allowed: "),
        (["generate", "  \n "], "prompt is empty; allowed: "),
        (["generate"], "either a prompt or --problem; allowed: exactly one"),
        (["generate", PROMPT, "--problem", "path_star"], "either a prompt or --problem; allowed: exactly one"),
        (["generate", "--problem", "chess"], "task = 'chess'; allowed: path_star"),
        (["generate", "--problem", "path_star:x"], "'x' is no index; allowed: TASK:0"),
        (["generate", PROMPT, "--lag", "-1"], "'--lag'.*greater than or equal to 0"),
        (["generate", PROMPT, "--rate", "1.5"], "'--rate'.*less than or equal to 1"),
        (["generate", PROMPT, "--rate=-0.1"], "'--rate'.*greater than or equal to 0"),
        (["generate", PROMPT, "--planners", "-1"], "'--planners'.*greater than or equal to 0"),
        (["generate", PROMPT, "--pace", "0"], "engine.pace = 0.0: .*greater than 0"),
        (["generate", PROMPT, "--clock", "virtual", "--pace", "5"], "pace = 5 with the virtual clock; allowed"),
        (["generate", PROMPT, "--channel", "telepathy"], "'--channel'"),
        (["generate", PROMPT, "--set", "search.depth=3"], "unknown key 'search.depth'; allowed: .*max_depth"),
        (["generate", PROMPT, "--set", "model.backbone.d_model=32"], "d_model = 32; allowed: 16"),
        (["generate", PROMPT, "--checkpoint", "no/such"], "checkpoint = 'no/such': no folder .*; allowed"),
        (["inspect", "no/such"], "checkpoint = 'no/such': no folder .*; allowed"),
        (["replay", "no/such.jsonl"], "'no/such.jsonl' cannot be read"),
        (["demo", "--figure", "demo.gif"], "ending 'gif'; allowed: pdf, png, svg"),
        (["demo", "--problems", "0"], "'--problems'"),
        (["generate", PROMPT, "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_what_is_allowed(crsm, args, expected):
    status, out, err = crsm(*args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert re.match(rf"error: .*{expected}", err), err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"event": "sta', "line 1: not JSON"),
        ("[1, 2]\n", "line 1: a list; allowed: an object"),
        ('{"event": "token", "generation": "g", "token": 3}\n', "line 1: not an event of this log"),
        ('{"event": "party", "generation": "g"}\n', "line 1: .*event = 'party'; allowed: start, request"),
        ("", "holds no generation; allowed"),
    ],
)
def test_a_corrupted_event_log_is_refused_by_its_line(crsm, tmp_path, text, expected):
    log = tmp_path / "events.jsonl"
    log.write_text(text)
    status, out, err = crsm("replay", log)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(expected, err), err


def test_a_write_that_was_tampered_with_is_refused(crsm, tmp_path):
    log = tmp_path / "events.jsonl"
    crsm("generate", PROMPT, *SHORT, "--event-log", log)
    lines = log.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"event": "inject"' in line)
    event = json.loads(lines[place])
    data = event["arrays"]["write_u_LRE"]["data"]
    event["arrays"]["write_u_LRE"]["data"] = ("B" if data[0] == "A" else "A") + data[1:]
    lines[place] = json.dumps(event)
    log.write_text("\n".join(lines) + "\n")
    status, _, err = crsm("replay", log)
    assert status == 2
    assert re.search(rf"line {place + 1}: .*the write has hash \w+; the event says \w+", err)


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["replay"], ["inspect"], ["demo"], ["serve"], ["export"], ["push"]]
)
def test_help_needs_neither_torch_nor_ray(command):
    code = (
        "import sys\nfrom crsm.cli import app\nfrom jobs.command import invoke\n"
        f"status = invoke(app, {[*command, '--help']})\n"
        "print(status, sorted({'torch', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "Usage" in done.stdout
