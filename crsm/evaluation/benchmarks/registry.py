"""From settings to a benchmark with its problems."""

from __future__ import annotations

from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.benchmarks.answers import Answers
from crsm.evaluation.benchmarks.base import Benchmark
from crsm.evaluation.benchmarks.choices import Choices
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.evaluation.benchmarks.text import Text
from crsm.tasks import Task, build_task
from crsm.tasks.arc import MultipleChoice
from crsm.tasks.base import Problem, Split, problems

GENERATED = 500
"""Problems of a task that generates any number of them, if the settings name none."""


def build_benchmark(settings: BenchmarkConfig, tokenizer: Tokenizer, seed: int) -> Benchmark:
    """A benchmark, its problems drawn and written.

    Args:
        settings: with the task's settings in them (:func:`crsm.evaluation.benchmarks.settings.pick_benchmark`).
        tokenizer: of the checkpoint.
        seed: of the problems.

    Raises:
        ValueError: naming the benchmark, and what is wrong with its data, its settings, or the vocabulary.
    """
    try:
        if settings.path is not None:
            return Text(settings, tokenizer)
        assert settings.task is not None
        task = build_task(settings.task)
        chosen = _draw(task, settings, seed)
        examples = _examples(task, settings, chosen, seed)
        kind = Choices if isinstance(task, MultipleChoice) else Answers
        return kind(settings, task, chosen, examples, tokenizer)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"benchmark {settings.name!r}: {error}") from error


def _draw(task: Task, settings: BenchmarkConfig, seed: int) -> list[Problem]:
    splits: tuple[Split, ...] = ("train", "valid", "test") if settings.split == "all" else (settings.split,)
    found: list[Problem] = []
    for split in splits:
        size = task.size(split)
        if settings.split == "all" and size is None:
            raise ValueError("split = 'all' of a task that generates its problems; allowed: train, valid, test")
        if settings.split == "all" and not size:
            continue
        left = settings.problems - len(found) if settings.problems else (size or GENERATED)
        if left:
            found += problems(task, seed, split, left)
    return found


def _examples(task: Task, settings: BenchmarkConfig, chosen: list[Problem], seed: int) -> list[Problem]:
    """The solved problems that stand before every problem; none of them is one that is asked."""
    if not settings.shots:
        return []
    if settings.examples is None and settings.split in ("train", "all"):
        raise ValueError(
            f"shots = {settings.shots} with split = {settings.split!r}: examples and problems would be the same; "
            "allowed: examples: {name: …, path: …} from another file"
        )
    source = task if settings.examples is None else build_task(settings.examples)
    asked = {problem.key for problem in chosen}
    drawn = [p for p in problems(source, seed, "train", settings.shots + len(asked)) if p.key not in asked]
    if len(drawn) < settings.shots:
        raise ValueError(
            f"shots = {settings.shots}; allowed: at most the {len(drawn)} training problems that there are"
        )
    return drawn[: settings.shots]
