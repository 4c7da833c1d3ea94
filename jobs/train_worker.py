"""Trains a stage on the workers of Ray Train: what every worker runs, and what the first one tells and saves."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.preemption import SaveOnNotice
from jobs.runs import MARKER, Work, local_copy, localised
from jobs.storage import StoragePath, fetch
from jobs.trackers import StageTrackers
from jobs.train_states import StateReports, latest_state

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from crsm.config import Config
    from crsm.data.tokenizer import Tokenizer
    from crsm.model import CRSM, Checkpoint
    from crsm.tasks import Task
    from crsm.training.loop import LoopState, Point
    from crsm.training.stage import Stage


def train(told: dict[str, Any]) -> dict[str, str] | None:
    """Runs on every worker. What is the user's to change comes back as data: a restart would only repeat it."""
    import ray.train

    world = ray.train.get_context().get_world_size()
    try:
        _train_and_save(Work(**told["work"]), told["board"])
    except FloatingPointError as error:  # raised on all workers or on none
        return {"kind": "FloatingPointError", "message": str(error)}
    except ValueError as error:
        if world > 1:  # the other workers may be waiting for this one
            raise
        return {"kind": "ValueError", "message": str(error)}
    return None


def _train_and_save(work: Work, board: ActorHandle) -> None:
    import ray.train
    import ray.train.torch

    from crsm.config import core_count, parse_config
    from crsm.threads import use_threads
    from crsm.training.execution import finished_model, prepare
    from crsm.training.loop import run_stage

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = parse_config(work.config, source="the run's settings")
    use_threads(config.train.threads or max(1, core_count() // context.get_local_world_size()))
    built = build_stage(work, config)
    stage = built.stage
    module = prepare(stage, config.train, world=world, device=ray.train.torch.get_device())
    resume = latest_state(work)
    states = StateReports(work, rank)
    reporter = _Reporter(work, board, resume.step if resume else 0, active=rank == 0)
    with_workers = f" with {world} workers" if world > 1 else ""
    reporter.say(("starts training" if resume is None else f"goes on from step {resume.step}") + with_workers)
    notice = SaveOnNotice()
    latest: dict[str, float] = {}
    """What is known of the model when a state is saved, for whoever compares runs."""

    def log(point: Point) -> None:
        latest.update(point)
        reporter.log(point)

    def evaluation(point: Point) -> None:
        latest.update(point)
        reporter.evaluation(point)

    def checkpoint(state: LoopState) -> None:
        started = time.monotonic()
        states.report(state, latest)
        notice.saved(time.monotonic() - started)
        if state.step % stage.settings.checkpoint_every and state.step < stage.settings.steps:
            reporter.say(f"saved step {state.step}: a node is about to go")
        reporter.keep_curves()

    def save_now() -> bool:
        states.check()
        return notice.is_due()

    result = run_stage(
        stage,
        rank=rank,
        world=world,
        module=module,
        resume=resume,
        fingerprint=work.fingerprint,
        on_log=log,
        on_evaluate=evaluation,
        on_checkpoint=checkpoint,
        save_now=save_now,
    )
    states.close()
    model = finished_model(stage, rank)
    if model is not None:
        save_stage(work, built, model.eval(), result.report(), reporter.say)
    reporter.close()


@dataclass(frozen=True, slots=True)
class Built:
    stage: Stage
    tasks: list[Task]
    tokenizer: Tokenizer
    previous: Checkpoint | None


def build_stage(work: Work, config: Config) -> Built:
    """The stage with its model and data, the same on every worker."""
    import torch

    from crsm.data.tokenizer import build_tokenizer
    from crsm.model import build_model, load_checkpoint
    from crsm.tasks import build_tasks
    from crsm.training.assembly import AssemblyStage
    from crsm.training.backbone import BackboneStage
    from crsm.training.dynamics import DynamicsStage
    from crsm.training.judgment import JudgmentStage

    local = localised(config)
    tasks = build_tasks(local.tasks if work.stage == "stage_1" else local.planned_tasks)
    previous = None
    if work.input_checkpoint is None:
        tokenizer = build_tokenizer(config.tokenizer, build_tasks(local.tasks), config.seed)
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer)
    else:
        # What a stage trains from the beginning may have other settings than the checkpoint's: another writer needs
        # no other backbone.
        later = ("world_model", "writer")
        renewable = {"stage_1": later, "stage_2": later, "stage_4": ("writer",)}.get(work.stage, ())
        torch.manual_seed(config.seed)
        previous = load_checkpoint(local_copy(work.input_checkpoint), config=config, renewable=renewable)
        model, tokenizer = previous.model, previous.tokenizer
        # The run's settings, with the sizes that were filled in when the model was made.
        model.config = config.model_copy(update={"model": model.config.model})
    stage: Stage
    match work.stage:
        case "stage_1":
            stage = BackboneStage(model, config.stage_1, config.seed, tasks, tokenizer)
        case "stage_2":
            stage = DynamicsStage(model, config.stage_2, config.seed, tasks, tokenizer)
        case "stage_3":
            assert work.rollouts is not None
            rollouts = read_rollouts(fetch(StoragePath.of(work.rollouts)))
            stage = JudgmentStage(model, config.stage_3, config.seed, tasks, tokenizer, rollouts)
        case _:
            length = config.deliberation.plan_length
            stage = AssemblyStage(model, config.stage_4, config.seed, tasks, tokenizer, length)
    return Built(stage, tasks, tokenizer, previous)


def read_rollouts(path: Path) -> list[Any]:
    """The roll-outs that stage 3 wrote, one JSON object a line."""
    from crsm.evaluation.rollouts import Rollout

    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Rollout(
            record["task"], record["system"], tuple(record["prompt"]), tuple(record["answer"]), bool(record["correct"])
        )
        for record in records
    ]


def save_stage(work: Work, built: Built, model: CRSM, report: dict[str, Any], say: Callable[[str], None]) -> None:
    from crsm.model import Checkpoint, save_checkpoint
    from crsm.training.calibration import calibrate_gates

    previous = built.previous
    horizon = report.get("trust_horizon", previous.trust_horizon if previous else None)
    checkpoint = Checkpoint(model, built.tokenizer, horizon, (previous.model_version if previous else 0) + 1)
    if work.stage == "stage_4":
        settings = model.config.stage_4
        may_open, why = gates_may_open(previous, model.config)
        if may_open:
            say("calibrates the gates")
        started = time.perf_counter()
        gates = calibrate_gates(
            checkpoint, built.tasks, count=settings.calibration_problems, seed=model.config.seed, may_open=may_open
        )
        if not may_open:
            gates["reason"] = why
        report |= {"gates": gates, "calibration_seconds": time.perf_counter() - started}
        say("gates open" if gates["open"] else f"GATES STAY SHUT: {gates['reason']}")
    if work.rollouts is not None:
        summary = StoragePath.of(work.rollouts).with_name("rollouts.json")
        report["rounds"] = json.loads(summary.read_text())["rounds"]
    report["commit"] = work.commit
    whole = (dict(previous.report) if previous else {}) | {work.stage: finite(report)}
    say("saves the checkpoint")
    checkpoint = dataclasses.replace(checkpoint, report=whole)
    if work.output.local is not None:
        save_checkpoint(checkpoint, work.output.local)
        return
    with tempfile.TemporaryDirectory(prefix="crsm-checkpoint-") as folder:
        save_checkpoint(checkpoint, Path(folder) / "checkpoint")
        work.output.upload(Path(folder) / "checkpoint", last=MARKER)


def gates_may_open(previous: Checkpoint | None, config: Config) -> tuple[bool, str]:
    judged = (previous.report if previous else {}).get("stage_3")
    if judged is None:
        return False, "stage 3 has not measured the pairwise branch accuracy of this model"
    accuracy, bar = judged.get("branch_accuracy"), config.stage_3.gate_accuracy
    if accuracy is None or not accuracy >= bar:
        return False, f"pairwise branch accuracy {accuracy} is below stage_3.gate_accuracy = {bar}"
    return True, ""


def finite(value: Any) -> Any:
    """Plain data without NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class _Reporter:
    """Curves for the trackers, and messages for the driver; silent on all workers but the first."""

    def __init__(self, work: Work, board: ActorHandle, step: int, active: bool) -> None:
        self._trackers: StageTrackers | None = None
        self._board = board if active else None
        if active:
            settings = {"seed": work.config["seed"], work.stage: work.config[work.stage]}
            self._trackers = StageTrackers(work.config["train"]["trackers"], work.place, settings, step, self.say)

    def log(self, point: Point) -> None:
        figures = {"loss": point["loss"], "lr": point["lr"], "tokens/s": point["tokens_per_second"]}
        self._tell({"step": int(point["step"]), **figures})
        if self._trackers is not None:
            self._trackers.log(point)

    def evaluation(self, point: Point) -> None:
        shown = {name: value for name, value in point.items() if name not in ("step", "seconds")}
        text = ", ".join(f"{name.removeprefix('valid/')} {value:.4g}" for name, value in list(shown.items())[:12])
        more = f", and {len(shown) - 12} more" if len(shown) > 12 else ""
        self.say(f"step {int(point['step'])}, held out: {text}{more}")
        if self._trackers is not None:
            self._trackers.log(point)

    def say(self, text: str) -> None:
        self._tell({"say": text})

    def keep_curves(self) -> None:
        """Puts them where the run lies."""
        if self._trackers is not None:
            self._trackers.keep()

    def close(self) -> None:
        if self._trackers is None or self._board is None:
            return
        import ray

        self._trackers.close()
        # What was told before this has arrived when it has.
        ray.get(self._board.read.remote(0), timeout=30)

    def _tell(self, message: dict[str, Any]) -> None:
        if self._board is not None:
            self._board.tell.remote(message)
