"""A fleet of actors that answers problems with both systems, for stage 3.

Invariants:

* a job says everything that decides its records; which actor does it, and after how many deaths, changes nothing;
* the work of a dead actor is given to another, a bounded number of times; an error *in* a job is the caller's;
* only an actor that has started is given work: where a lost node leaves no room for all, the others do it;
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
        # No GPU is reserved for it, so that one it may see belongs to others.
        here = {name: getattr(config, name).model_copy(update={"device": "cpu"}) for name in ("engine", "planners")}
        config = config.model_copy(update=here)
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
        RuntimeError: a job was given up after ``MAX_TRIES`` actors died over it, or as many in a row did not start.
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
        RuntimeError: a job was given up after ``MAX_TRIES`` actors died over it, or as many in a row did not start.
    """
    waiting = deque(range(len(jobs)))
    tries = [0] * len(jobs)
    idle: list[ActorHandle] = []
    busy: dict[Any, tuple[ActorHandle, int | Literal["starts", "is asked"]]] = {}
    """What every actor that is not idle does: a job, or it says that it is there."""
    done = deaths = failed_starts = 0

    def start() -> None:
        actor = start_actor()
        busy[actor.__ray_ready__.remote()] = (actor, "starts")

    for _ in range(min(actors, len(jobs))):
        start()
    try:
        while done < len(jobs):
            while waiting and idle:
                actor, index = idle.pop(), waiting.popleft()
                busy[call(actor, jobs[index])] = (actor, index)
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            actor, what = busy.pop(ready)
            try:
                answer = ray.get(ready)
            except RayActorError as error:
                deaths += 1
                if what == "starts":
                    failed_starts += 1
                    if failed_starts >= MAX_TRIES:
                        raise RuntimeError(f"{MAX_TRIES} actors in a row died as they started: {error}") from error
                elif isinstance(what, int):
                    tries[what] += 1
                    if tries[what] >= MAX_TRIES:
                        raise RuntimeError(f"{jobs[what]}: {MAX_TRIES} actors died over it") from error
                    waiting.appendleft(what)
                _end(actor)
                start()
                while idle:  # they may have gone with the same node; the next job must not find out
                    actor = idle.pop()
                    busy[actor.__ray_ready__.remote()] = (actor, "is asked")
            else:
                idle.append(actor)
                if isinstance(what, int):
                    done += 1
                    yield what, answer, deaths
                else:
                    failed_starts = 0
    finally:
        for actor in [*idle, *(actor for actor, _ in busy.values())]:
            _end(actor)


def _end(actor: ActorHandle) -> None:
    with contextlib.suppress(RayActorError):
        ray.kill(actor)
