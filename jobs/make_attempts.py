"""Model-made attempts at open-text problems: a first training on solutions alone, then verified answers of that model.

Value heads learn from attempts with outcomes. Generated tasks make their own; for GSM8K only a model can, so stage 1 is
run twice: briefly without attempts, then, from the weights of the first run, with the attempts that these weights made.
"""

from __future__ import annotations

import json as jsonlib
import sys
from typing import TYPE_CHECKING

from jobs.runs import check_source, describe_outcome, resolve, run_folder, within_reach
from jobs.stage_3_value_head import roll_out_jobs
from jobs.storage import StoragePath
from jobs.train import train_stage

if TYPE_CHECKING:
    from actors.rollouts import Record, RolloutJob
    from crsm.config import Config
    from crsm.tasks import Split

FOLDER = "stage_1.bootstrap"


def needs_attempts(settings: Config) -> bool:
    """Whether a bootstrapped or a frozen backbone has to make attempts: a task has no recorded ones."""
    return (settings.stage_1.bootstrap_steps > 0 or settings.stage_1.freeze_backbone) and any(
        task.name == "gsm8k" and task.attempts_path is None for task in settings.tasks
    )


def with_attempts(settings: Config, path: StoragePath) -> Config:
    """The settings of a run whose open-text tasks read their attempts from ``path``."""
    tasks = tuple(
        task.model_copy(update={"attempts_path": str(path)}) if task.name == "gsm8k" else task
        for task in settings.tasks
    )
    return settings.model_copy(update={"tasks": tasks})


def bootstrap(
    settings: Config, source: str | StoragePath | None, storage: str, name: str
) -> tuple[Config, StoragePath]:
    """Trains on solutions alone and makes the attempts; both are skipped where an earlier start made them. A frozen
    backbone is not trained: it makes them as it is.

    Returns:
        The settings with the attempts in them, and the checkpoint from which stage 1 goes on.
    """
    folder = run_folder(storage, name) / FOLDER
    if settings.stage_1.freeze_backbone:
        check_source("stage_1", settings, source)
        assert source is not None
        maker = resolve(source)
    else:
        first = settings.stage_1.model_copy(update={"steps": settings.stage_1.bootstrap_steps})
        outcome = train_stage(
            "stage_1", settings.model_copy(update={"stage_1": first}), source, storage, name, folder_name=FOLDER
        )
        print(f"bootstrap: {describe_outcome(outcome)}", file=sys.stderr)
        maker = outcome.checkpoint
    path = folder / "attempts.jsonl"
    if not path.is_file():
        folder.check_writable()
        within = within_reach(maker, folder)
        path.write_text(attempts_jsonl(settings, roll_out_jobs(settings, within, plan_attempts(settings), "attempts")))
    return with_attempts(settings, path), maker


def plan_attempts(settings: Config) -> list[RolloutJob]:
    """One attempt of System 1 at each of the first ``bootstrap_problems`` training problems of every open-text task,
    and at as many held-out problems as an evaluation looks at: value heads are measured on attempts too."""
    from actors.rollouts import RolloutJob
    from jobs.stage_3_value_head import CHUNK

    splits: dict[Split, int] = {
        "train": settings.stage_1.bootstrap_problems,
        "valid": max(settings.stage_1.evaluate_problems, settings.stage_3.evaluate_problems),
    }
    return [
        RolloutJob(
            task=task.label,
            split=split,
            problem_seed=settings.seed,
            first=first,
            count=min(CHUNK, count - first),
            system=1,
            temperature=settings.stage_3.temperature,
            sampling_seed=settings.seed,
        )
        for task in settings.tasks
        if task.name == "gsm8k"
        for split, count in splits.items()
        for first in range(0, count, CHUNK)
    ]


def attempts_jsonl(settings: Config, records: list[Record]) -> str:
    """The records as the task reads them: question, attempt, correct; answers that never came to an end are left out.

    Raises:
        ValueError: none came to an end.
    """
    from crsm.tasks import build_tasks

    tasks = {task.name: task for task in build_tasks(settings.tasks)}
    lines = []
    for record in records:
        problem = tasks[record["task"]].generate(record["problem_seed"], record["split"], record["index"])
        ended = len(record["answer"]) < settings.sampling.max_tokens
        if ended and record["text"].strip():
            attempt = {
                "question": problem.data["question"],
                "attempt": record["text"],
                "correct": record["correct"],
            }
            lines.append(jsonlib.dumps(attempt, ensure_ascii=False) + "\n")
    if not lines:
        raise ValueError(
            f"none of {len(records)} attempts came to an end; allowed: more stage_1.bootstrap_steps (without "
            "freeze_backbone), or a larger sampling.max_tokens"
        )
    return "".join(lines)
