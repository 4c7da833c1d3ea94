"""The model that lm-eval sees, and lm-eval itself where it is installed: the same numbers as jobs.evaluate's."""

import importlib.util
import json

import pytest

from crsm.config import ArcConfig
from crsm.evaluation.benchmarks.registry import build_benchmark
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.evaluation.lm_eval_model import HarnessModel, main, register
from crsm.evaluation.scoring import encode_continuation, score
from crsm.model import save_checkpoint
from tests.fixtures import text_checkpoint

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

RECORDS = [
    {
        "id": f"made_{number}",
        "question": f"Which of these is made of {thing}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[number % len(labels)],
    }
    for number, (thing, texts, labels) in enumerate(
        [
            ("wood", ["a chair", "a long river of cold water", "rain", "ice"], ["A", "B", "C", "D"]),
            ("water", ["a stone wall", "ice", "smoke"], ["A", "B", "C"]),
            ("light", ["a sunbeam at noon", "clay", "a spoon", "sand"], ["1", "2", "3", "4"]),
            ("salt", ["the sea, in part", "wool", "wax", "a feather", "an egg"], ["A", "B", "C", "D", "E"]),
            ("wax", ["a candle", "a nail", "a häuschen", "fog"], ["1", "2", "3", "4"]),
        ]
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "text"
    save_checkpoint(text_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("arc") / "made.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def test_pairs_are_scored_as_continuations(folder):
    model, checkpoint = HarnessModel(str(folder)), text_checkpoint()
    pairs = [("Question: what?\nAnswer:", " rain"), ("", "12 drops"), ("Question: what?\nAnswer: ", "of them")]
    encoded = [encode_continuation(checkpoint.tokenizer, *pair) for pair in pairs]
    assert [total for total, _ in model.score_pairs(pairs)] == score(checkpoint, encoded).totals


def test_greedy_is_what_greedy_decoding_says(folder):
    model = HarnessModel(str(folder))
    context = "Question: what?\nAnswer:"
    (said,) = model.generate([(context, {"max_gen_toks": 4, "do_sample": False})])
    likeliest = [(context, said[:1]), (context, said), (context, " rain")]
    found = [greedy for _, greedy in model.score_pairs(likeliest)]
    tokens = model.checkpoint.tokenizer.encode(context + said)
    assert found[2] is False
    if tokens[: len(tokens) - 4] == model.checkpoint.tokenizer.encode(context):
        assert found[1] is True


@pytest.mark.parametrize("system", [1, 2])
def test_a_text_in_windows_adds_up(folder, system):
    model = HarnessModel(str(folder), system=system, max_length=8)
    text = "which of these is the sound of rain? 12 drops, 3 of them"
    whole, empty = model.score_texts([text, ""])
    assert empty == 0.0
    tokens = model.checkpoint.tokenizer.encode(text)
    assert len(tokens) > 16 and whole < -len(tokens)  # random weights: worse than a nat per token


def test_generation_takes_the_harness_settings(folder):
    model = HarnessModel(str(folder))
    plain, again, hot, other = model.generate(
        [
            ("rain", {"until": ["\n\n"], "max_gen_toks": 9}),
            ("rain", {"until": "\n\n", "max_gen_toks": 9, "temperature": 0.0}),
            ("rain", {"max_gen_toks": 9, "do_sample": True, "temperature": 5.0}),
            ("rain", {"max_gen_toks": 9, "temperature": 5.0}),
        ]
    )
    assert plain == again
    assert hot != plain and other != plain and hot != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": 3}, "system = 3; allowed: 1, 2"),
        ({"max_length": 1}, "max_length = 1; allowed: a whole number from 2 on"),
        ({"checkpoint": "nowhere"}, "checkpoint = 'nowhere': no folder"),
        ({"lag": -1}, "deliberation.lag = -1"),
        ({"batch_size": "many"}, "engine.max_batch = 'many'"),
    ],
)
def test_a_wrong_argument_is_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        HarnessModel(**({"checkpoint": str(folder)} | arguments))


@pytest.mark.parametrize(("asked", "expected"), [(None, 256), (1, 256), ("auto:4", 256), (16, 16), ("12", 12)])
def test_the_batch_is_the_settings_unless_one_is_asked_for(folder, asked, expected):
    assert HarnessModel(str(folder), batch_size=asked).checkpoint.config.engine.max_batch == expected


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_there_is_one_line():
    with pytest.raises(ValueError, match=r"lm-eval is not installed; it is the extra `eval`"):
        register()
    with pytest.raises(SystemExit, match="error: lm-eval is not installed"):
        main()


# ---------------------------------------------------------------------------------------------------- lm-eval itself

TASK = """
task: made_arc
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The harness reads local files only and caches where the test does."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "LM_HARNESS_CACHE_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@needs_lm_eval
@pytest.mark.parametrize("system", [1, 2])
def test_the_harness_and_our_evaluation_agree_on_arc(folder, data, tmp_path, offline, system):
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_arc.yaml").write_text(TASK.format(path=data))
    theirs = lm_eval.simple_evaluate(
        model="crsm",
        model_args={"checkpoint": str(folder), "system": system, "lag": 0},
        tasks=["made_arc"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    model = HarnessModel(str(folder), system=system, lag=0)
    settings = BenchmarkConfig(name="arc_easy", task=ArcConfig(path=str(data)))
    benchmark = build_benchmark(settings, model.checkpoint.tokenizer, 0)
    answers = benchmark.answer(model.checkpoint, f"system{system}", 0, len(benchmark), 0)
    assert bool(answers.plans["injections"]) == (system == 2)
    mine = {
        problem["prompt"]: record["logprobs"]
        for problem, record in zip(benchmark.problems(), answers.records, strict=True)
    }
    samples = theirs["samples"]["made_arc"]
    assert len(samples) == len(mine) == len(RECORDS)
    for sample in samples:
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(mine[sample["arguments"][0][0]], abs=1e-4)
    measures = benchmark.measures(answers.records)
    for name in ("acc", "acc_norm"):
        assert theirs["results"]["made_arc"][f"{name},none"] == measures[name].value


@needs_lm_eval
def test_the_harness_measures_bits_per_byte_as_we_do(folder, tmp_path, offline):
    import lm_eval
    from lm_eval.tasks import TaskManager

    texts = ["which of these is the sound of rain? 12 drops, 3 of them", "Answer: häuschen"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_text.yaml").write_text(
        f'task: made_text\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{path}"}}}}\n'
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    register()
    theirs = lm_eval.simple_evaluate(
        model="crsm",
        model_args=f"checkpoint={folder},max_length=8",
        tasks=["made_text"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    checkpoint = text_checkpoint()
    benchmark = build_benchmark(BenchmarkConfig(name="text", path=str(path), window=8), checkpoint.tokenizer, 0)
    records = benchmark.answer(checkpoint, "system1", 0, len(benchmark), 0).records
    assert sum(record["bytes"] for record in records) == sum(len(text.encode()) for text in texts)
    assert theirs["results"]["made_text"]["bits_per_byte,none"] == pytest.approx(
        benchmark.measures(records)["bits_per_byte"].value, rel=1e-5
    )


@needs_lm_eval
def test_the_harness_generates_with_either_system(folder, offline):
    from lm_eval.api.instance import Instance

    register()
    from lm_eval.api.registry import get_model

    for system in (1, 2):
        model = get_model("crsm").create_from_arg_string(f"checkpoint={folder},system={system}", {"batch_size": 4})
        asked = [("rain", {"until": ["\n"], "max_gen_toks": 5}), ("12", {"max_gen_toks": 3})]
        requests = [Instance("generate_until", {}, arguments, index) for index, arguments in enumerate(asked)]
        assert model.generate_until(requests) == HarnessModel(str(folder), system=system).generate(asked)


@needs_lm_eval
def test_the_command_line_is_the_harness_with_this_model(folder, data, tmp_path, offline, monkeypatch, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_arc.yaml").write_text(TASK.format(path=data))
    command = ["lm_eval", "--model", "crsm", "--tasks", "made_arc", "--include_path", str(tmp_path / "tasks")]
    monkeypatch.setattr("sys.argv", [*command, "--model_args", f"checkpoint={folder},system=1"])
    main()
    assert "made_arc" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--model_args", f"checkpoint={folder},system=3"])
    with pytest.raises(SystemExit, match="error: system = 3; allowed: 1, 2"):
        main()
