"""Trains a model in this process alone, without Ray: one device, some minutes at a time.

For a machine with one GPU that is there for a short while, or that has no Ray. Stages, settings, data and checkpoints
are those of :mod:`jobs.pipeline`, and so is the folder of the run, but for the states: there is one per stage,
``loop_state.safetensors``. Invariants:

* the same command goes on where it stopped: by ``--minutes``, or killed at any time;
* a stage that is finished is passed over; one that was begun with other settings is refused;
* the number of steps is in the settings, or fixed when stage 1 begins (``--fill``), and then kept with the run.
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, load_settings, run, write_result
from jobs.runs import MARKER, CheckpointOption, NameOption, Work, fingerprint, locate, resolve, run_folder
from jobs.train import one_line_failure

if TYPE_CHECKING:
    import torch

    from crsm.config import Config
    from crsm.training.loop import LoopState, Point

SPARE = 0.9
"""Of the minutes to be filled: the rest is for evaluations, states, and the start of another call."""
_MEASURED_FROM, _MEASURED_TO = 5, 15
"""Steps between which the time of a step is taken, after kernels are compiled and memory is allocated."""
_STEPS_FILE = "steps.json"


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop."""

    until: float
    """On the monotonic clock."""
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        return self.until - self.clock()


class _TimeIsUpError(Exception):
    """The state is saved."""


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    stages: Annotated[str, typer.Option("--stages", metavar="N,N,…", help="Which, in a row.")] = "1,2,3,4",
    minutes: Annotated[
        float, typer.Option("--minutes", min=0, help="Stop after so many, with the state saved; 0: at the end.")
    ] = 0.0,
    fill: Annotated[
        float,
        typer.Option("--fill", min=0, help="Stage 1: as many steps as so many minutes hold; 0: those of the settings."),
    ] = 0.0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, or auto.")] = "auto",
    checkpoint: CheckpointOption = None,
    name: NameOption = None,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="DIR", help="Where runs lie: a folder; train.storage_path.")
    ] = None,
) -> None:
    """Train stages in this process, without Ray, some minutes at a time."""
    from jobs.pipeline import parse_stages

    limits = Limits(time.monotonic() + 60 * minutes if minutes else float("inf"))
    settings = load_settings(config, overrides, seed)
    chosen = parse_stages(stages)
    storage, name = locate(settings, storage, name)
    folder = run_folder(storage, name)
    if folder.local is None:
        raise ValueError(f"storage = {storage!r}; allowed: a folder of this machine")

    from crsm.devices import pick_device

    where = pick_device(device)
    results: dict[str, Any] = {"device": str(where), "stages": {}, "finished": True}
    source = checkpoint
    with one_line_failure():
        for stage in chosen:
            trained = Training(settings, stage, folder.local / stage, source or _before(folder.local, stage), where)
            results["stages"][stage] = trained.train(limits, fill if stage == "stage_1" else 0.0)
            if not results["stages"][stage]["finished"]:
                results["finished"] = False
                print("time is up: the same command goes on", file=sys.stderr)
                break
            source = str(trained.output)
    write_result("train_alone", settings, settings.seed, results, json)


def _before(run: Path, stage: str) -> str | None:
    """What the stage before left."""
    number = int(stage[-1])
    found = [run / f"stage_{earlier}" / "checkpoint" for earlier in range(number - 1, 0, -1)]
    return next((str(path) for path in found if (path / MARKER).is_file()), None)


class Training:
    """One stage of a run."""

    def __init__(self, settings: Config, stage: str, folder: Path, source: str | None, device: torch.device) -> None:
        from jobs.runs import check_source

        check_source(stage, settings, source)
        self.settings, self.stage, self.folder, self.source, self.device = settings, stage, folder, source, device
        self.output = folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)

    def train(self, limits: Limits, fill: float) -> dict[str, Any]:
        """Goes on until the stage or the time ends; what is known of it then."""
        if (self.output / MARKER).is_file():
            print(f"{self.stage} had finished", file=sys.stderr)
            return {"finished": True, **_report(self.output, self.stage)}
        if fill:
            self._fix_steps(60 * fill)
        rollouts = self._roll_outs() if self.stage == "stage_3" else None
        work = self._work(rollouts)
        try:
            self._run(work, limits)
        except _TimeIsUpError:
            state = self._state(work)
            assert state is not None
            return {"finished": False, "steps": state.step, "seconds": state.seconds, "curve": state.curve}
        return {"finished": True, **_report(self.output, self.stage)}

    def _work(self, rollouts: Path | None) -> Work:
        from crsm.training.loop import check_fingerprint
        from jobs.command import commit
        from jobs.storage import StoragePath

        steps = self.folder / _STEPS_FILE
        if steps.is_file():
            own = getattr(self.settings, self.stage).model_copy(update=jsonlib.loads(steps.read_text()))
            self.settings = self.settings.model_copy(update={self.stage: own})
        source = None if self.source is None else resolve(self.source)
        made = None if rollouts is None else StoragePath.of(rollouts)
        work = Work(
            stage=self.stage,
            config=self.settings.model_dump(mode="json"),
            input_checkpoint=None if source is None else str(source),
            folder=str(self.folder),
            rollouts=None if rollouts is None else str(rollouts),
            fingerprint=fingerprint(self.stage, self.settings, source, made),
            commit=commit(),
        )
        begun = self.folder / "run.json"
        if begun.is_file():
            try:
                check_fingerprint(jsonlib.loads(begun.read_text()), work.fingerprint, str(self.folder))
            except ValueError as error:
                raise ValueError(f"{error}; allowed: the same settings, or another --name") from error
        else:
            begun.write_text(jsonlib.dumps(work.fingerprint, indent=1, ensure_ascii=False) + "\n")
        return work

    def _state(self, work: Work) -> LoopState | None:
        from crsm.training.loop import STATE_FILE, LoopState

        path = self.folder / STATE_FILE
        return LoopState.load(path, self.stage, work.fingerprint) if path.exists() else None

    def _run(self, work: Work, limits: Limits) -> None:
        from crsm.config import core_count
        from crsm.threads import use_threads
        from crsm.training.execution import finished_model, prepare
        from crsm.training.loop import STATE_FILE, run_stage
        from jobs.train_worker import build_stage, save_stage

        use_threads(self.settings.train.threads or core_count())
        built = build_stage(work, self.settings)
        module = prepare(built.stage, self.settings.train, world=1, device=self.device)
        resume = self._state(work)
        stop = False

        def save_now() -> bool:
            nonlocal stop
            stop = limits.left <= 0
            return stop

        begun = resume.step if resume else 0
        with Progress(self.stage, built.stage.settings.steps, begun=begun) as progress:

            def log(point: Point) -> None:
                rate = point["tokens_per_second"]
                progress.update(int(point["step"]), loss=point["loss"], lr=point["lr"], tokens_per_second=rate)

            def keep(state: LoopState) -> None:
                state.save(self.folder / STATE_FILE)
                if stop and state.step < built.stage.settings.steps:
                    raise _TimeIsUpError

            result = run_stage(
                built.stage,
                module=module,
                resume=resume,
                fingerprint=work.fingerprint,
                on_log=log,
                on_checkpoint=keep,
                save_now=save_now,
            )
            model = finished_model(built.stage, rank=0)
            assert model is not None
            save_stage(work, built, model.eval(), result.report(), progress.say)

    # ------------------------------------------------------------------------------------------------ number of steps

    def _fix_steps(self, seconds: float) -> None:
        """As many steps as the time holds, by the time that some of them take; once for a run."""
        path = self.folder / _STEPS_FILE
        if path.is_file():
            return
        from jobs.train_worker import build_stage

        work = replace(self._bare(), config=self.settings.model_dump(mode="json"))
        each = seconds_of_a_step(build_stage(work, self.settings).stage, self.settings, self.device)
        steps = max(1, int(SPARE * seconds / each))
        path.write_text(jsonlib.dumps({"steps": steps}) + "\n")
        print(f"{self.stage}: {each:.3g} s a step, so {steps} steps in {seconds / 60:g} minutes", file=sys.stderr)

    def _bare(self) -> Work:
        source = None if self.source is None else str(resolve(self.source))
        return Work(self.stage, {}, source, str(self.folder), None, {}, "")

    # ----------------------------------------------------------------------------------------------------- roll-outs

    def _roll_outs(self) -> Path:
        """Answers of both systems to training problems, made here if they are missing."""
        path = self.folder / "rollouts.jsonl"
        summary = path.with_suffix(".json")
        if summary.is_file():
            return path
        from crsm.evaluation.rollouts import roll_out
        from crsm.model import load_checkpoint
        from crsm.placement import placed
        from crsm.tasks import build_tasks
        from jobs.stage_3_value_head import SEED_STRIDE, accuracies

        assert self.source is not None
        loaded = load_checkpoint(self.source)
        loaded.model.config = self.settings.model_copy(update={"model": loaded.model.config.model})
        there = placed(loaded, self.device)
        tasks = build_tasks(self.settings.tasks)
        seed, count = self.settings.seed + SEED_STRIDE, self.settings.stage_3.problems // len(tasks)
        records: list[dict[str, Any]] = []
        with Progress("stage_3 roll-outs", 2 * len(tasks)) as progress:
            for task in tasks:
                problems = [task.generate(seed, "train", index) for index in range(count)]
                for system in (1, 2):
                    made = roll_out(
                        there,
                        task,
                        problems,
                        system=system,
                        temperature=self.settings.stage_3.temperature,
                        seed=seed,
                    )
                    records += [
                        {
                            "task": rollout.task,
                            "system": system,
                            "prompt": list(rollout.prompt),
                            "answer": list(rollout.answer),
                            "correct": rollout.correct,
                        }
                        for rollout in made
                    ]
                    progress.update(len(records) // max(1, count))
        path.write_text("".join(jsonlib.dumps(record) + "\n" for record in records))
        rounds = [{"round": 1, "accuracy": accuracies(records)}]
        summary.write_text(jsonlib.dumps({"rounds": rounds}, indent=1) + "\n")
        return path


def seconds_of_a_step(stage: Any, settings: Config, device: torch.device) -> float:
    """Of training, once kernels are compiled; the stage is of no use afterwards."""
    from crsm.training.execution import prepare
    from crsm.training.loop import run_stage

    stage.settings = stage.settings.model_copy(update={"log_every": 1})
    module = prepare(stage, settings.train, world=1, device=device)
    first, last = _MEASURED_FROM, min(_MEASURED_TO, stage.settings.steps)
    first = min(first, last - 1)
    clock: dict[int, float] = {0: time.perf_counter()}

    class _EnoughError(Exception):
        pass

    def log(point: Point) -> None:
        clock[int(point["step"])] = time.perf_counter()
        if point["step"] >= last:
            raise _EnoughError

    try:
        run_stage(stage, module=module, on_log=log)
    except _EnoughError:
        pass
    return (clock[last] - clock[first]) / (last - first)


def _report(checkpoint: Path, stage: str) -> dict[str, Any]:
    return dict(jsonlib.loads((checkpoint / MARKER).read_text())["report"][stage])


if __name__ == "__main__":
    run(main)
