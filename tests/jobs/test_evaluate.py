"""jobs.evaluate: its table, its answers, going on after a kill, and everything that a user can get wrong."""

import json

import pytest
import torch

from crsm.data.tokenizer import Tokenizer
from crsm.model import save_checkpoint
from jobs import benchmark_reasoning, evaluate
from jobs.command import invoke
from jobs.evaluation.folder import ANSWERS, PARTS, PROBLEMS, SETTINGS
from jobs.evaluation.settings import load_evaluation
from tests.fixtures import text_checkpoint, tiny_checkpoint

FEW = ("--problems", "6", "--set", "sampling.max_tokens=7", "--set", "deliberation.injection_rate=0.5", "--seed", "7")


@pytest.fixture(autouse=True)
def single_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(tiny_checkpoint(), path / "tiny")
    save_checkpoint(text_checkpoint(), path / "text")
    return path


@pytest.fixture
def job(folder, tmp_path, capsys):
    """Runs the job on a checkpoint: exit status, its results (None without any), standard error."""

    def call(*args, checkpoint="tiny", output=tmp_path / "out"):
        options = ["--checkpoint", str(folder / checkpoint), "--output", str(output), "--json", "-"]
        status = invoke(evaluate.main, [*options, *map(str, args)])
        found = capsys.readouterr()
        return status, json.loads(found.out)["results"] if found.out else None, found.err

    return call


@pytest.fixture
def arc(tmp_path):
    """Made-up questions, one of them with labels of its own."""
    path = tmp_path / "arc.jsonl"
    records = [
        {
            "question": f"Which of these is thing {number}?",
            "choices": {"text": ["a stone", f"thing {number}", "rain and rivers"], "label": labels},
            "answerKey": labels[1],
        }
        for number, labels in enumerate((["A", "B", "C"], ["1", "2", "3"], ["C", "A", "B"]))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(results):
    return {key: value for key, value in results.items() if key not in ("times", "output")}


def test_the_figures_are_those_of_benchmark_reasoning(job, folder, capsys):
    status, results, err = job("--benchmarks", "path_star", "--controls", "all", *FEW)
    assert status == 0, err
    invoke(benchmark_reasoning.main, ["--checkpoint", str(folder / "tiny"), "--json", "-", *FEW])
    theirs = json.loads(capsys.readouterr().out)["results"]
    systems = results["benchmarks"]["path_star"]["systems"]
    expected = {"system1": theirs["system1"], "system2": theirs["system2"], **theirs["controls"]}
    assert list(systems) == list(expected)
    for name, figures in expected.items():
        found = systems[name]["measures"]["accuracy"]
        assert (found["value"], found["interval"]) == (figures["accuracy"], figures["interval"])
    pair = systems["system2"]
    assert pair["measures"]["accuracy"]["mcnemar_p"] == theirs["mcnemar_p"]
    assert pair["measures"]["accuracy"]["difference_interval"] == theirs["difference"]["interval"]
    assert pair["plans"]["plan_hit_rate"] == theirs["plan_hit_rate"]
    assert systems["gate_zero"]["changed"] == 0


def test_every_answer_and_problem_is_kept(job, tmp_path):
    status, results, err = job("--benchmarks", "path_star", "--controls", "gate_zero", *FEW)
    assert status == 0, err
    place = tmp_path / "out" / "path_star"
    assert {path.name for path in place.iterdir()} == {ANSWERS, PARTS, PROBLEMS, SETTINGS}
    answers, problems = lines(place / ANSWERS), lines(place / PROBLEMS)
    assert [problem["index"] for problem in problems] == list(range(6))
    assert [(a["system"], a["index"]) for a in answers] == [
        (system, index) for system in ("system1", "system2", "gate_zero") for index in range(6)
    ]
    right = [answer["correct"] for answer in answers if answer["system"] == "system2"]
    accuracy = results["benchmarks"]["path_star"]["systems"]["system2"]["measures"]["accuracy"]
    assert accuracy["value"] == sum(right) / 6
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["job"] == "evaluate" and without_times(saved["results"]) == without_times(results)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## path_star" in text and "| gate zero |" in text and "--seed 7" in text


def test_arc_and_text_and_generated_answers_stand_in_one_table(job, tmp_path, arc):
    words = tmp_path / "words.txt"
    words.write_text("which of these is the sound of rain? " * 4)
    settings = tmp_path / "evaluate.yaml"
    settings.write_text(
        f"""
evaluation:
  benchmarks:
    - {{name: arc_easy, task: {{name: arc_easy, path: {arc}}}}}
    - {{name: words, path: {words}, window: 16}}
    - {{name: gsm8k, task: {{name: gsm8k, path: sample}}, problems: 3, max_tokens: 5, shots: 1}}
  controls: [gate_zero, silent_tokens]
  resamples: 50
deliberation: {{lag: 0}}
"""
    )
    status, results, err = job("--config", settings, checkpoint="text")
    assert status == 0, err
    found = results["benchmarks"]
    assert {name: figures["kind"] for name, figures in found.items()} == {
        "arc_easy": "choices",
        "words": "text",
        "gsm8k": "answers",
    }
    assert set(found["arc_easy"]["systems"]["system1"]["measures"]) == {"acc", "acc_norm"}
    assert list(found["gsm8k"]["systems"]) == ["system1", "system2", "gate_zero", "silent_tokens"]
    assert list(found["words"]["systems"]) == ["system1", "system2", "gate_zero"]
    assert "arc_easy: without silent_tokens" in err
    for figures in found.values():
        assert figures["systems"]["gate_zero"]["changed"] == 0
        assert figures["systems"]["system2"]["plans"]["requests"] > 0
    assert all(answer["tokens"] <= 5 for answer in lines(tmp_path / "out" / "gsm8k" / ANSWERS))


def test_a_run_that_was_cut_short_goes_on_to_the_same_table(job, tmp_path, monkeypatch):
    options = ("--benchmarks", "path_star", "--controls", "random_write", "--set", "evaluation.part=2", *FEW)
    _, whole, _ = job(*options, output=tmp_path / "whole")
    report = (tmp_path / "whole" / "results.md").read_text()
    answers = (tmp_path / "whole" / "path_star" / ANSWERS).read_bytes()

    parts = tmp_path / "out" / "path_star" / PARTS
    job(*options)
    kept = parts.read_bytes().splitlines(keepends=True)
    assert len(kept) == 9
    parts.write_bytes(b"".join(kept[:4]) + kept[4][:70])  # killed in the middle of a line
    for path in (tmp_path / "out" / "path_star" / ANSWERS, tmp_path / "out" / "results.md"):
        path.unlink()
    status, results, err = job(*options)
    assert status == 0 and "going on: 4 of 9 parts are there" in err
    assert without_times(results) == without_times(whole)
    assert (tmp_path / "out" / "results.md").read_text() == report
    assert (tmp_path / "out" / "path_star" / ANSWERS).read_bytes() == answers

    # What is complete is not answered again.
    monkeypatch.setattr("crsm.evaluation.benchmarks.examiner.Examiner.answer", None)
    assert job(*options)[0] == 0


def test_what_was_made_with_something_else_is_refused_or_put_aside(job, tmp_path):
    options = ("--benchmarks", "path_star", "--controls", "none")
    assert job(*options, *FEW)[0] == 0
    for changed, name in (
        (("--set", "search.simulations=5"), "search.simulations = 8"),
        (("--set", "evaluation.part=3"), "part = 64"),
        (("--seed", "8"), "seed = 7"),
        (("--problems", "5"), "problems = '"),
    ):
        status, _, err = job(*options, *FEW, *changed)
        assert status == 2 and err.count("\n") == 1
        assert f"out/path_star was made with {name}" in err and "allowed: the same, another --output, or --fresh" in err
    status, _, err = job(*options, *FEW, "--seed", "8", "--fresh")
    assert status == 0, err
    assert (tmp_path / "out.old-1" / "path_star" / ANSWERS).is_file()


def test_other_weights_are_refused(job, tmp_path, folder):
    save_checkpoint(tiny_checkpoint(seed=5), tmp_path / "other")
    assert job("--benchmarks", "path_star", "--controls", "none", *FEW)[0] == 0
    status, _, err = job("--benchmarks", "path_star", "--controls", "none", *FEW, checkpoint=tmp_path / "other")
    assert status == 2 and "was made with checkpoint = " in err


def test_equal_compute_stands_beside(job):
    status, results, err = job("--benchmarks", "path_star", "--controls", "none", "--compute", *FEW)
    assert status == 0, err
    methods = results["benchmarks"]["path_star"]["compute"]["methods"]
    assert set(methods) == {"system_2", "best_of", "self_consistency", "beam_search"}
    assert "accuracy against compute after the prompt" in err


def test_a_tokenizer_that_came_with_imported_weights_is_enough(job, tmp_path, arc):
    backend = text_checkpoint().tokenizer.to_json()
    tree = json.loads(backend)
    own = {"<pad>": "<|padding|>", "<eos>": "<|endoftext|>", "<right>": "zz1", "<wrong>": "zz2"}
    tree["model"]["vocab"] = {own.get(token, token): i for token, i in tree["model"]["vocab"].items()}
    tree["added_tokens"] = [t | {"content": own[t["content"]]} for t in tree["added_tokens"] if t["id"] < 2]
    del tree["model"]["vocab"]["zz1"], tree["model"]["vocab"]["zz2"]
    ids = {token: i for i, token in enumerate(sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].get))}
    tree["model"]["vocab"] = ids
    tokenizer = Tokenizer.from_json(json.dumps(tree))
    assert tokenizer.is_foreign and not tokenizer.has_verdicts
    # The embedding of the public Mamba-2 weights has more rows than their tokenizer has tokens.
    save_checkpoint(text_checkpoint(tokenizer, vocab_size=tokenizer.vocab_size + 11), tmp_path / "foreign")
    text = tmp_path / "words.txt"
    text.write_text("which of these is the sound of rain? <|endoftext|> " * 3)
    settings = tmp_path / "evaluate.yaml"
    settings.write_text(
        f"evaluation: {{controls: [gate_zero, oracle], benchmarks: [{{name: text, path: {text}, window: 16}}, "
        f"{{name: arc_easy, task: {{name: arc_easy, path: {arc}}}}}, "
        "{name: gsm8k, task: {name: gsm8k, path: sample}, problems: 2, max_tokens: 20}]}\n"
    )
    status, results, err = job("--config", settings, checkpoint=tmp_path / "foreign")
    assert status == 0, err
    for figures in results["benchmarks"].values():
        assert figures["systems"]["gate_zero"]["changed"] == 0


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "no benchmark is asked for; allowed: --benchmarks NAMES"),
        (["--benchmarks", "chess"], "benchmark = 'chess'; allowed: .*arc_challenge, arc_easy"),
        (["--benchmarks", "path_star,"], "benchmark = ''; allowed: "),
        (["--benchmarks", "gsm8k"], "benchmark 'gsm8k': tasks.gsm8k.path = None loads openai/gsm8k"),
        (["--benchmarks", "tree_path"], "benchmark 'tree_path': unknown words"),
        (["--benchmarks", "path_star", "--controls", "placebo"], "control 'placebo'; allowed: all, none, gate_zero"),
        (["--benchmarks", "path_star", "--set", "evaluation.part=0"], "evaluation.part = 0"),
        (
            ["--benchmarks", "path_star", "--set", "evaluation.parts=2"],
            "unknown key 'evaluation.parts'; allowed: ",
        ),
        (["--benchmarks", "path_star", "--set", "deliberation.lag=-1"], "deliberation.lag = -1"),
        (["--benchmarks", "path_star", "--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
    ],
)
def test_a_mistake_is_one_line(job, monkeypatch, tmp_path, args, expected):
    import re
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    status, results, err = job(*args)
    assert (status, results) == (2, None)
    assert err.count("\n") == 1, err
    assert re.match(rf"error: .*{expected}", err), err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(job, tmp_path):
    (tmp_path / "out" / "path_star").mkdir(parents=True)
    (tmp_path / "out" / "path_star" / "mine.txt").write_text("x")
    status, _, err = job("--benchmarks", "path_star", *FEW)
    assert status == 2 and "holds something else; allowed: a new or empty folder" in err
    assert {path.name for path in (tmp_path / "out" / "path_star").iterdir()} == {"mine.txt"}


def test_answers_that_try_to_run_code_are_text(job, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    said = f"__import__('pathlib').Path({str(mark)!r}).touch() #### __import__('os').getpid()"
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: said)
    status, results, err = job(
        "--benchmarks", "gsm8k", "--config", gsm8k(tmp_path), "--controls", "none", checkpoint="text"
    )
    assert status == 0, err
    assert results["benchmarks"]["gsm8k"]["systems"]["system1"]["measures"]["accuracy"]["value"] == 0.0
    assert lines(tmp_path / "out" / "gsm8k" / ANSWERS)[0]["text"] == said
    assert not mark.exists()


def gsm8k(tmp_path):
    path = tmp_path / "gsm8k.yaml"
    path.write_text(
        "evaluation: {benchmarks: [{name: gsm8k, task: {name: gsm8k, path: sample}, problems: 2, max_tokens: 4}]}"
    )
    return path


def test_the_settings_of_an_evaluation_are_changed_by_file_then_set(tmp_path):
    asked = load_evaluation(gsm8k(tmp_path), ["evaluation.benchmarks.gsm8k.shots=2", "search.simulations=4"])
    assert (asked.evaluation.benchmarks[0].shots, asked.evaluation.benchmarks[0].max_tokens) == (2, 4)
    assert asked.overrides == ("search.simulations=4",)
    with pytest.raises(ValueError, match=r"unknown key 'evaluation.benchmarks.0.shot'; allowed: .*shots"):
        path = tmp_path / "typo.yaml"
        path.write_text("evaluation: {benchmarks: [{name: gsm8k, shot: 2}]}")
        load_evaluation(path)
