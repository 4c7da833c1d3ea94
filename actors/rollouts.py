"""A fleet of actors that answers problems with both systems, for stage 3.

Invariants:

* a job says everything that decides its records; which actor does it, and after how many deaths, changes nothing;
* the work of a dead actor is given to another, a bounded number of times; an error *in* a job is the caller's;
* records are plain data, in the order of the jobs.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.metrics import Counts, hand_on_run
from actors.weights import Weights, open_source
from crsm.config import Config
from crsm.evaluation.rollouts import roll_out
from crsm.tasks import Split, build_tasks
from crsm.threads import use_threads

MAX_TRIES = 3
"""Actors that may die over one job before it is given up."""


@dataclass(frozen=True, slots=True)
class RolloutJob:
    """Problems ``first`` to ``first + count`` of a task's stream, answered by one system."""

    task: str
    split: Split
    problem_seed: int
    first: int
    count: int
    system: Literal[1, 2]
    temperature: float
    sampling_seed: int
    """Problem ``i`` of the stream is sampled with ``sampling_seed + i``."""


Job = TypeVar("Job")
Record = dict[str, Any]
"""``task``, ``split``, ``problem_seed``, ``index``, ``system``, ``prompt`` and ``answer`` (tokens), ``text``,
``correct``."""


class RolloutActor:
    """Answers problems with a checkpoint of its own."""

    def __init__(self, source: str | Weights, config: Config, threads: int) -> None:
        use_threads(threads)
        self._checkpoint = open_source(source)
        # The run's settings of search and sampling, with the sizes that the checkpoint has.
        model = self._checkpoint.model
        model.config = config.model_copy(update={"model": model.config.model})
        self._tasks = {task.name: task for task in build_tasks(config.tasks)}
        self._counts = Counts("rollouts")

    def roll_out(self, job: RolloutJob) -> list[Record]:
        task = self._tasks[job.task]
        indices = range(job.first, job.first + job.count)
        rollouts = roll_out(
            self._checkpoint,
            task,
            [task.generate(job.problem_seed, job.split, index) for index in indices],
            system=job.system,
            temperature=job.temperature,
            seed=job.sampling_seed + job.first,
            hear=lambda metrics: hand_on_run(self._counts, metrics.summary()),
        )
        for correct, count in Counter(rollout.correct for rollout in rollouts).items():
            what = {"task": job.task, "system": str(job.system), "correct": str(correct).lower()}
            self._counts.add("crsm_rollouts", count, **what)
        return [
            {
                "task": job.task,
                "split": job.split,
                "problem_seed": job.problem_seed,
                "index": index,
                "system": job.system,
                "prompt": list(rollout.prompt),
                "answer": list(rollout.answer),
                "text": self._checkpoint.tokenizer.decode(rollout.answer),
                "correct": rollout.correct,
            }
            for index, rollout in zip(indices, rollouts, strict=True)
        ]


def run_fleet(
    jobs: Sequence[RolloutJob],
    start_actor: Callable[[], ActorHandle],
    actors: int,
    on_done: Callable[[int, int], None] = lambda done, deaths: None,
) -> list[Record]:
    """Rolls out all jobs; the records in the order of the jobs.

    Args:
        jobs: what to do.
        start_actor: makes an actor with a method ``roll_out(job)``; called again for every one that dies.
        actors: how many work at once.
        on_done: called with the number of finished jobs and of deaths.

    Raises:
        RuntimeError: a job was given up after ``MAX_TRIES`` actors died over it.
    """
    results: dict[int, list[Record]] = {}
    finished = fleet_results(jobs, start_actor, actors, lambda actor, job: actor.roll_out.remote(job))
    for index, records, deaths in finished:
        results[index] = records
        on_done(len(results), deaths)
    return [record for index in range(len(jobs)) for record in results[index]]


def fleet_results(
    jobs: Sequence[Job],
    start_actor: Callable[[], ActorHandle],
    actors: int,
    call: Callable[[ActorHandle, Job], Any],
) -> Iterator[tuple[int, Any, int]]:
    """Gives jobs to actors, one at a time each, until all are done; the results as they come.

    Args:
        jobs: what to do.
        start_actor: makes an actor; called again for every one that dies.
        actors: how many work at once.
        call: gives a job to an actor; the reference to its result.

    Yields:
        A job's index, its result, and how many actors have died so far.

    Raises:
        RuntimeError: a job was given up after ``MAX_TRIES`` actors died over it.
    """
    waiting = deque(range(len(jobs)))
    tries = [0] * len(jobs)
    idle = [start_actor() for _ in range(min(actors, len(jobs)))]
    running: dict[Any, tuple[ActorHandle, int]] = {}
    deaths = 0
    try:
        while waiting or running:
            while waiting and idle:
                actor, index = idle.pop(), waiting.popleft()
                running[call(actor, jobs[index])] = (actor, index)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, index = running.pop(ready)
            try:
                result = ray.get(ready)
            except RayActorError as error:
                deaths += 1
                tries[index] += 1
                if tries[index] >= MAX_TRIES:
                    raise RuntimeError(f"{jobs[index]}: {MAX_TRIES} actors died over it") from error
                _end(actor)
                waiting.appendleft(index)
                idle.append(start_actor())
            else:
                idle.append(actor)
                yield index, result, deaths
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            _end(actor)


def _end(actor: ActorHandle) -> None:
    with contextlib.suppress(RayActorError):
        ray.kill(actor)
