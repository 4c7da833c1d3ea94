"""Benchmarks: what is asked, what is kept of the answers, and the figures that are made of them."""

import json
import math

import numpy as np
import pytest
import torch

from crsm.config import ArcConfig, Config, Gsm8kConfig, PathStarConfig, SamplingConfig
from crsm.evaluation.benchmarks.answers import COMPUTE, spent_of
from crsm.evaluation.benchmarks.base import Measure
from crsm.evaluation.benchmarks.examiner import Examiner, Part
from crsm.evaluation.benchmarks.registry import build_benchmark
from crsm.evaluation.benchmarks.settings import BenchmarkConfig, EvaluationConfig, known_tasks, pick_benchmark
from crsm.evaluation.benchmarks.table import compute_rows, report, rows, tabulate
from crsm.evaluation.comparison import run_system
from crsm.evaluation.equal_compute import accuracy_against_compute, curves
from crsm.evaluation.scoring import encode_continuation, score
from crsm.model import use_settings
from crsm.tasks import build_task, problems
from tests.fixtures import TASK, text_checkpoint, tiny_bpe, tiny_checkpoint

ARC = [
    {
        "question": f"Which is {word}?",
        "choices": {"text": texts, "label": ["A", "B", "C"]},
        "answerKey": key,
    }
    for word, texts, key in (
        ("wet", ["sand", "rain, as a rule, and rivers", "wood"], "B"),
        ("loud", ["a sound", "ice", "wax"], "A"),
        ("thin", ["a rock", "an egg", "a sheet of paper"], "C"),
    )
]


@pytest.fixture(autouse=True)
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint():
    return tiny_checkpoint()


@pytest.fixture
def arc(tmp_path):
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ARC))
    return BenchmarkConfig(name="arc_easy", task=ArcConfig(path=str(tmp_path / "arc.jsonl")))


def star(checkpoint, **settings):
    return build_benchmark(BenchmarkConfig(name="path_star", task=TASK, **settings), checkpoint.tokenizer, 7)


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_benchmark_is_a_task_of_the_checkpoint_or_a_known_one_or_stated():
    config = Config(tasks=(PathStarConfig(arms=5),))
    stated = EvaluationConfig(benchmarks=(BenchmarkConfig(name="gsm8k", task=Gsm8kConfig(path="sample"), shots=2),))
    assert pick_benchmark(stated, config, "path_star").task == PathStarConfig(arms=5)
    assert pick_benchmark(stated, config, "arc_challenge").task == ArcConfig(name="arc_challenge")
    assert pick_benchmark(stated, config, "gsm8k") == stated.benchmarks[0]
    assert {"path_star", "gsm8k", "arc_easy", "arc_challenge"} <= set(known_tasks())
    with pytest.raises(ValueError, match=r"benchmark = 'chess'; allowed: .*arc_challenge, arc_easy, .*text"):
        pick_benchmark(stated, config, "chess")
    with pytest.raises(ValueError, match=r"benchmark 'text': .*allowed: a txt or jsonl file"):
        pick_benchmark(stated, config, "text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gsm8k", "pass_at": [2]}, r"pass_at = \[2\]; allowed: 1 to samples = 1"),
        ({"name": "gsm8k", "path": "some.txt"}, "path = 'some.txt'; allowed: None"),
        ({"name": "arc_easy", "task": {"name": "gsm8k"}}, "task.name = 'gsm8k'; allowed: 'arc_easy'"),
        ({"name": "text", "path": "a.txt", "window": 1}, "window"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**settings)


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_the_comparison_whatever_the_parts(checkpoint):
    benchmark = star(checkpoint, problems=10)
    drawn = problems(build_task(TASK), 7, "test", 10)
    config = checkpoint.config
    for system in ("system1", "system2", "oracle"):
        run = run_system(
            system,
            checkpoint,
            build_task(TASK),
            drawn,
            deliberation=config.deliberation,
            search=config.search,
            sampling=SamplingConfig(seed=7),
            seed=7,
        )
        records = [
            record for first in (0, 4, 8) for record in benchmark.answer(checkpoint, system, first, 4, 7).records
        ]
        assert [record["index"] for record in records] == list(range(10))
        assert [record["text"] for record in records] == [answer.text for answer in run.answers]
        assert benchmark.measures(records)["accuracy"].value == run.accuracy


def test_shut_gates_change_no_bit_and_open_ones_do(checkpoint):
    benchmark = star(checkpoint, problems=6)
    records = {name: benchmark.answer(checkpoint, name, 0, 6, 7) for name in ("system1", "gate_zero", "oracle")}
    bits = {name: [record["bits"] for record in result.records] for name, result in records.items()}
    assert bits["gate_zero"] == bits["system1"] != bits["oracle"]
    assert records["gate_zero"].plans["requests"] > 0


def test_several_samples_differ_and_give_the_unbiased_pass_at_k(checkpoint):
    benchmark = star(checkpoint, problems=4, samples=3, pass_at=(1, 2, 3), temperature=4.0)
    records = benchmark.answer(checkpoint, "system1", 0, 4, 7).records
    assert [(record["index"], record["sample"]) for record in records] == [(i, s) for i in range(4) for s in range(3)]
    assert len({record["text"] for record in records}) > 4
    right = [[True, False, False], [False] * 3, [True] * 3, [True, True, False]]
    faked = [record | {"correct": right[record["index"]][record["sample"]]} for record in records]
    measures = benchmark.measures(faked)
    assert measures["pass@1"].top_M.tolist() == pytest.approx([1 / 3, 0, 1, 2 / 3])
    assert measures["pass@2"].top_M.tolist() == pytest.approx([2 / 3, 0, 1, 1])  # 1 − C(3 − c, 2) / C(3, 2)
    assert measures["pass@3"].top_M.tolist() == [1, 0, 1, 1]


def test_solved_examples_stand_before_every_problem_and_are_none_of_them():
    settings = BenchmarkConfig(name="gsm8k", task=Gsm8kConfig(path="sample"), shots=2, problems=5)
    task = build_task(Gsm8kConfig(path="sample"))
    asked = list(build_benchmark(settings, tiny_bpe(), 3).problems())
    examples = problems(task, 3, "train", 2)
    before = "".join(f"{example.prompt}{example.solution}\n\n" for example in examples)
    assert len(asked) == 5
    for problem in asked:
        assert problem["prompt"].startswith(f"{before}Question: ") and problem["prompt"].endswith("\nAnswer:")
        assert problem["key"] not in {example.key for example in examples}


def test_a_test_set_as_a_whole_needs_its_examples_from_elsewhere(tmp_path):
    whole = {"name": "gsm8k", "task": {"name": "gsm8k", "path": "sample"}, "split": "all"}
    assert len(build_benchmark(BenchmarkConfig(**whole), tiny_bpe(), 0)) == 200
    assert len(build_benchmark(BenchmarkConfig(**whole, problems=150), tiny_bpe(), 0)) == 150
    with pytest.raises(ValueError, match=r"benchmark 'gsm8k': shots = 2 with split = 'all'.*allowed: examples"):
        build_benchmark(BenchmarkConfig(**whole, shots=2), tiny_bpe(), 0)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(30)))
    other = {"examples": {"name": "gsm8k", "path": str(path)}, "problems": 3}
    first = next(iter(build_benchmark(BenchmarkConfig(**whole, **other, shots=2), tiny_bpe(), 0).problems()))
    assert first["prompt"].count("####") == 2


def test_a_vocabulary_that_cannot_write_a_problem_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"benchmark 'path_star': unknown words? '\d+'.*allowed: "):
        task = PathStarConfig(arms=2, length=3, labels=60)
        build_benchmark(BenchmarkConfig(name="path_star", task=task), checkpoint.tokenizer, 0)
    with pytest.raises(ValueError, match="benchmark 'gsm8k': unknown words 'Question:'"):
        settings = BenchmarkConfig(name="gsm8k", task=Gsm8kConfig(path="sample"))
        build_benchmark(settings, checkpoint.tokenizer, 0)


def test_equal_compute_in_parts_is_equal_compute(checkpoint):
    use_settings(checkpoint, checkpoint.config.model_copy(update={"sampling": SamplingConfig(max_tokens=6)}))
    benchmark = star(checkpoint, problems=5)
    records = [r for first in (0, 3) for r in benchmark.answer(checkpoint, COMPUTE, first, 3, 7).records]
    records = json.loads(json.dumps(records))
    task = build_task(TASK)
    whole = accuracy_against_compute(checkpoint, task, problems(task, 7, "test", 5), lag=1, seed=7)
    found = curves(checkpoint, "path_star", 1, spent_of(records))
    assert compute_rows(found)[1][0][0] == "system 2, 8"
    assert found["methods"].keys() == whole["methods"].keys()
    for method, points in whole["methods"].items():
        for mine, theirs in zip(found["methods"][method], points, strict=True):
            assert mine.pop("interval") == pytest.approx(theirs.pop("interval"))
            assert mine == pytest.approx(theirs)


# ------------------------------------------------------------------------------------------------------------- choices


def test_options_are_scored_as_continuations_of_the_question(arc):
    checkpoint = text_checkpoint()
    benchmark = build_benchmark(arc, checkpoint.tokenizer, 0)
    records = benchmark.answer(checkpoint, "system1", 0, 3, 0).records
    by_prompt = {problem["prompt"]: record for problem, record in zip(benchmark.problems(), records, strict=True)}
    for raw in ARC:
        prompt = f"Question: {raw['question']}\nAnswer:"
        pairs = [encode_continuation(checkpoint.tokenizer, prompt, f" {text}") for text in raw["choices"]["text"]]
        totals = score(checkpoint, pairs).totals
        record = by_prompt[prompt]
        assert record["logprobs"] == pytest.approx(totals, abs=1e-4)
        right = "ABC".index(raw["answerKey"])
        per_character = [total / len(text) for total, text in zip(totals, raw["choices"]["text"], strict=True)]
        assert record["acc"] is (int(np.argmax(totals)) == right)
        assert record["acc_norm"] is (int(np.argmax(per_character)) == right)


def test_choices_know_shut_gates_and_every_control_that_is_defined(arc):
    checkpoint = text_checkpoint()
    benchmark = build_benchmark(arc, checkpoint.tokenizer, 0)
    base = benchmark.answer(checkpoint, "system1", 0, 3, 0).records
    assert benchmark.answer(checkpoint, "gate_zero", 0, 3, 0).records == base
    for control in ("system2", "random_write", "other_problem", "time_shifted", "oracle", "untrained_planner"):
        result = benchmark.answer(checkpoint, control, 0, 3, 0)
        assert [record["tokens"] for record in result.records] == [record["tokens"] for record in base]
        assert result.plans["requests"] > 0
    assert set(benchmark.excluded) == {"silent_tokens"}


# ---------------------------------------------------------------------------------------------------------------- text


def test_the_windows_of_a_text_have_its_bytes_and_tokens_together(tmp_path):
    checkpoint = text_checkpoint()
    texts = ["which is the sound of rain? 水 and häuschen\n" * 3, "x"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [texts[0], "  ", texts[1]]))
    benchmark = build_benchmark(BenchmarkConfig(name="text", path=str(path), window=16), checkpoint.tokenizer, 0)
    records = benchmark.answer(checkpoint, "system1", 0, len(benchmark), 0).records
    assert sum(record["bytes"] for record in records) == sum(len(text.encode()) for text in texts)
    assert sum(record["tokens"] for record in records) == sum(len(checkpoint.tokenizer.encode(t)) for t in texts)
    measures = benchmark.measures(records)
    nats = -sum(record["logprob"] for record in records)
    assert measures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / sum(r["bytes"] for r in records))
    assert benchmark.answer(checkpoint, "gate_zero", 0, len(benchmark), 0).records == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a\.csv' is no text to predict; allowed: \.txt, \.jsonl, and \.gz of them"),
        ("a.txt", b"\xff\xfe", r"a\.txt' is not UTF-8 at byte 0"),
        ("a.txt", b" \n", r"a\.txt' holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', r"a\.jsonl' line 2: text = 'None'; allowed: a str"),
        ("missing.txt", None, r"missing\.txt' cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    settings = BenchmarkConfig(name="text", path=str(tmp_path / name))
    with pytest.raises(ValueError, match=f"benchmark 'text': .*{message}"):
        build_benchmark(settings, tiny_bpe(), 0)


def test_a_closed_vocabulary_names_the_document_that_it_cannot_write(tmp_path, checkpoint):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1 2 3"}\n{"text": "1 zebra"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl' line 2: unknown word 'zebra'"):
        build_benchmark(BenchmarkConfig(name="text", path=str(path)), checkpoint.tokenizer, 0)


# --------------------------------------------------------------------------------------------------------------- table


class Made:
    """A benchmark whose answers are given."""

    name, kind, digest = "made", "answers", "0"

    def __init__(self, size):
        self._size = size

    def __len__(self):
        return self._size

    def measures(self, records):
        return {
            "accuracy": Measure(np.array([float(record["right"]) for record in records])),
            "bits": Measure(*(np.array([record[name] for record in records]) for name in ("cost", "size")), "bits"),
        }


def made(right, costs):
    return [
        {"right": r, "cost": c, "size": 1.0 + (i % 3), "tokens": 2, "bits": f"{r}{c}"}
        for i, (r, c) in enumerate(zip(right, costs, strict=True))
    ]


def test_the_table_pairs_every_system_with_system_1():
    one = made([0] * 12 + [1] * 8, [3.0] * 20)
    two = made([1] * 20, [2.5] * 20)
    figures = tabulate(
        Made(20), {"system1": one, "system2": two, "gate_zero": one}, {"system2": {"hits": 3, "settled": 4}}, 500
    )
    systems = figures["systems"]
    accuracy = systems["system2"]["measures"]["accuracy"]
    assert (accuracy["value"], accuracy["difference"]) == (1.0, pytest.approx(0.6))
    assert accuracy["mcnemar_p"] == pytest.approx(2 * 0.5**12)
    low, high = accuracy["difference_interval"]
    assert 0.3 < low < 0.6 < high < 0.9
    size = sum(1.0 + (i % 3) for i in range(20))
    bits = systems["system2"]["measures"]["bits"]
    assert bits["difference"] == pytest.approx(-0.5 * 20 / size)
    assert bits["difference_interval"][1] < 0 and bits["mcnemar_p"] is None
    assert systems["system2"]["changed"] == 20 and systems["gate_zero"]["changed"] == 0
    assert systems["system2"]["plans"]["plan_hit_rate"] == 0.75
    assert systems["gate_zero"]["measures"]["accuracy"]["mcnemar_p"] == 1.0


def test_the_report_has_a_row_per_system_and_measure():
    one, two = made([0, 1], [3.0, 3.0]), made([1, 1], [2.5, 3.0])
    figures = tabulate(Made(2), {"system1": one, "system2": two}, {}, 50)
    figures["settings"] = BenchmarkConfig(name="gsm8k", shots=3, samples=2).model_dump(mode="json")
    results = {"checkpoint": {"name": "x", "weights": "y"}, "seed": 1, "lag": 2, "benchmarks": {"made": figures}}
    text = report("Title", results, "python -m jobs.evaluate")
    assert text.count("| System 1 |") == text.count("| System 2 |") == 2
    assert "3 solved examples before each, 2 samples at temperature 0.8" in text
    assert [measure for measure, _, _ in rows(figures)] == ["accuracy", "bits"]


# ------------------------------------------------------------------------------------------------------------ examiner


def test_an_examiner_with_other_problems_refuses(checkpoint):
    settings = {"path_star": BenchmarkConfig(name="path_star", task=TASK, problems=4)}
    examiner = Examiner(checkpoint, settings, 7)
    digest = examiner.benchmark("path_star").digest
    part = Part("path_star", "system1", 0, 4)
    assert len(examiner.answer(part, digest).records) == 4
    with pytest.raises(ValueError, match="benchmark 'path_star' has other problems here"):
        Examiner(checkpoint, settings, 8).answer(part, digest)
