"""Runs the trials of a sweep on Ray Tune.

Invariants:

* what is to be run is known before Ray starts, but for Optuna, which is asked as it goes;
* every finished trial is kept in the output folder at once, written by the driver alone (:mod:`jobs.ablation.place`);
  a sweep goes on from there, and needs nothing that Ray keeps, though that lies there as well, in ``tune/``;
* a trial has no state worth keeping: one whose node is lost starts anew elsewhere;
* a process loads the checkpoint once and runs one trial after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from actors.cluster import start_ray
from actors.metrics import Counts, hand_on_run
from crsm.config import core_count
from jobs.ablation.place import TUNE_FOLDER, add_ended, read_ended
from jobs.ablation.settings import AblationConfig, ResourcesConfig
from jobs.ablation.space import Point, Range, Space
from jobs.ablation.table import Record
from jobs.ablation.trial import Bench, Tally, parts
from jobs.storage import StoragePath
from jobs.trackers import trackers_folder, tune_callbacks

METRIC = "accuracy"
"""What searchers and ASHA look at."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A trial that is to be run."""

    trial: int | None
    """Its number; None: counted as it ends."""
    point: Point
    seed: int
    controls: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------------- finished trials


def read_records(folder: StoragePath | Path) -> list[Record]:
    """Finished trials."""
    records: dict[int, Record] = {}
    for found in read_ended(StoragePath.of(folder)):
        with contextlib.suppress(TypeError, KeyError):
            record = Record(**(found | {"tally": Tally(**found["tally"])}))
            records.setdefault(record.trial, record)
    return [records[trial] for trial in sorted(records)]


def append_record(folder: StoragePath | Path, record: Record) -> None:
    """One more, kept when this returns."""
    add_ended(StoragePath.of(folder), dataclasses.asdict(record))


# ------------------------------------------------------------------------------------------------------------- a trial


class AblationTrial(tune.Trainable):
    """Measures one point with one seed, a rung at a time."""

    def setup(self, config: dict[str, Any], bench: Bench, settings: AblationConfig) -> None:
        from crsm.threads import use_threads

        use_threads(1)
        self._bench, self._settings = bench, settings
        counts = Counts(settings.name)
        bench.hear = lambda metrics: hand_on_run(counts, metrics.summary())
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        self._told = _told(config, self._settings.seeds)
        rungs = self._settings.rungs if self._settings.scheduler == "asha" else 1
        self._parts = parts(len(self._bench.problems(self._told.seed)), rungs)
        self._tally = Tally()

    def step(self) -> dict[str, Any]:
        part = self._parts.pop(0)
        self._tally += self._bench.measure(self._told.point, self._told.seed, part, self._told.controls)
        return {
            METRIC: self._tally.accuracy,
            "problems": self._tally.problems,
            "tally": json.dumps(dataclasses.asdict(self._tally)),  # a text: no tracker takes its parts for figures
            "finished": not self._parts,
            tune.result.DONE: not self._parts,
        }


class Listener(tune.Callback):
    """Tells the driver of every finished trial. Tune keeps a copy of its settings; nothing of this is in it."""

    def __init__(self, on_result: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        self._on_result: Callable[[dict[str, Any], dict[str, Any]], None] | None = on_result

    def __getstate__(self) -> dict[str, Any]:
        return {"_on_result": None}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._on_result is not None:
            self._on_result(trial.config, trial.last_result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"trial {trial.trial_id} lost its process and is run again", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- running


def quiet_tune() -> None:
    """Leaves the talking to the job: to be called before Tune starts."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one says something even where it is to be silent
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is raised
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is an interruption, not an end


@contextlib.contextmanager
def cluster(resources: ResourcesConfig) -> Iterator[None]:
    """Ray for a sweep: the cluster that there is, or this machine's cores.

    Raises:
        ValueError: no node has what one trial asks for.
    """
    quiet_tune()
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    if not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "local") == "local":
        import torch

        check_resources(resources, [{"CPU": float(core_count()), "GPU": float(torch.cuda.device_count())}])
    with start_ray(num_cpus=core_count()):
        check_resources(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield


def check_resources(resources: ResourcesConfig, nodes: Sequence[dict[str, float]]) -> None:
    """
    Raises:
        ValueError: no node has what one trial asks for; what is asked and what is there are named.
    """
    need = {"CPU": resources.num_cpus} | ({"GPU": resources.num_gpus} if resources.num_gpus else {})
    if any(all(node.get(name, 0.0) >= amount for name, amount in need.items()) for node in nodes):
        return
    asked = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    there = ", ".join(" and ".join(f"{node.get(name, 0.0):g} {name}" for name in need) for node in nodes)
    raise ValueError(
        f"ablation.resources: a trial asks {asked}; the nodes of the cluster have {there or 'nothing'}. "
        "Allowed: what one node has"
    )


def run_planned(
    bench: Bench,
    settings: AblationConfig,
    folder: StoragePath,
    planned: Sequence[Planned],
    on_record: Callable[[Record], None],
) -> None:
    """Runs trials that are known beforehand; ``on_record`` hears of each as it ends."""

    def hear(config: dict[str, Any], result: dict[str, Any]) -> None:
        told = _told(config, settings.seeds)
        assert told.trial is not None
        on_record(_record(told.trial, told, result))

    trials = [dataclasses.asdict(plan) for plan in planned]
    _fit(bench, settings, folder, {"trial": tune.grid_search(trials)}, hear)


def run_optuna(
    bench: Bench,
    settings: AblationConfig,
    folder: StoragePath,
    space: Space,
    done: Sequence[Record],
    seed: int,
    on_record: Callable[[Record], None],
) -> None:
    """Lets Optuna choose points, each measured with every seed; it is told the means, those of ``done`` too."""
    import optuna
    from ray.tune.search import Repeater
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    complete, _ = complete_points(done, settings.seeds)
    # Another seed after an interruption: the points that were drawn before are not drawn again.
    searcher = OptunaSearch(metric=METRIC, mode="max", seed=seed + len(complete))
    searcher.set_search_properties(METRIC, "max", {key: _domain(values) for key, values in space.items()})
    for point, accuracy in complete:
        searcher.add_evaluated_point(point, accuracy)
    trial = max((record.trial for record in done), default=-1) + 1

    def hear(config: dict[str, Any], result: dict[str, Any]) -> None:
        nonlocal trial
        on_record(_record(trial, _told(config, settings.seeds), result))
        trial += 1

    left = (settings.points - len(complete)) * len(settings.seeds)
    _fit(bench, settings, folder, {}, hear, Repeater(searcher, repeat=len(settings.seeds)), left)


def require_optuna() -> None:
    """
    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            "ablation.method = 'optuna', but Optuna is not installed; allowed: grid, random, or optuna after "
            "pip install 'crsm[tune]'"
        )


def _fit(
    bench: Bench,
    settings: AblationConfig,
    folder: StoragePath,
    param_space: dict[str, Any],
    on_result: Callable[[dict[str, Any], dict[str, Any]], None],
    searcher: tune.search.Searcher | None = None,
    samples: int = 1,
) -> None:
    trainable = tune.with_resources(
        tune.with_parameters(AblationTrial, bench=bench, settings=settings),
        {"cpu": settings.resources.num_cpus, "gpu": settings.resources.num_gpus},
    )
    with trackers_folder(settings.trackers, folder) as written:
        results = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=searcher,
                scheduler=_scheduler(settings),
                num_samples=samples,
                max_concurrent_trials=settings.concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                **experiment(folder),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[Listener(on_result), *tune_callbacks(settings.trackers, settings.name, written)],
            ),
        ).fit()
    if results.errors:
        raise results.errors[0]


def experiment(folder: StoragePath) -> dict[str, Any]:
    """Where Ray Tune keeps what it knows of an experiment: a folder for every start of a sweep."""
    path, filesystem = (folder / TUNE_FOLDER).for_ray()
    return {
        "name": time.strftime("%Y-%m-%d_%H-%M-%S"),
        "storage_path": path,
        "storage_filesystem": filesystem,
    }


def _scheduler(settings: AblationConfig) -> TrialScheduler:
    if settings.scheduler == "all":
        return FIFOScheduler()
    # Rungs are steps: a task with few problems has fewer than were asked for.
    return AsyncHyperBandScheduler(max_t=settings.rungs, grace_period=1, reduction_factor=settings.reduction)


def _told(config: dict[str, Any], seeds: Sequence[int]) -> Planned:
    """What a trial is to measure: as it was planned, or as Optuna wants it."""
    from ray.tune.search.repeater import TRIAL_INDEX

    if "trial" in config:
        return Planned(**(config["trial"] | {"controls": tuple(config["trial"]["controls"])}))
    point = {key: value for key, value in config.items() if key != TRIAL_INDEX}
    return Planned(None, point, seeds[config[TRIAL_INDEX]])


def _record(trial: int, told: Planned, result: dict[str, Any]) -> Record:
    tally = Tally(**json.loads(result["tally"]))
    return Record(trial, told.point, told.seed, tally, finished=result["finished"])


def complete_points(done: Sequence[Record], seeds: Sequence[int]) -> tuple[list[tuple[Point, float]], list[Planned]]:
    """What Optuna is told of an interrupted sweep: points that were measured with every seed, and their mean accuracy.

    Returns:
        These, and the trials that are missing of the other points.
    """
    points: dict[str, list[Record]] = {}
    for record in done:
        points.setdefault(repr(sorted(record.point.items())), []).append(record)
    complete, missing = [], []
    trial = max((record.trial for record in done), default=-1) + 1
    for records in points.values():
        left = [seed for seed in seeds if seed not in {record.seed for record in records}]
        for seed in left:
            missing.append(Planned(trial, records[0].point, seed))
            trial += 1
        if not left:
            mean = sum(record.tally.accuracy for record in records) / len(records)
            complete.append((records[0].point, mean))
    return complete, missing


def _domain(values: tuple[Any, ...] | Range) -> Any:
    """The values as Tune knows them."""
    if not isinstance(values, Range):
        return tune.choice(list(values))
    if values.whole:
        low, high = int(values.low), int(values.high) + 1
        return tune.lograndint(low, high) if values.log else tune.randint(low, high)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)
