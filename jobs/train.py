"""Runs the training stages on Ray Train; the only module that touches ``ray.train``.

A *run* is a folder, ``<storage>/<name>``; a stage's part of it is ``<storage>/<name>/<stage>``:

    run.json             the settings that decide the stage's course
    checkpoint_*/        states of the loop, kept by Ray Train
    checkpoint/          the finished CRSM checkpoint; it appears whole, as the stage's last act
    progress.jsonl       what the worker said, for whoever watches
    ../tensorboard/<stage>/

The same storage and name go on where they stopped: a finished stage gives its result at once, a stopped one resumes
from its last state, and one that was made with other settings is refused; ``--fresh`` puts what is there of a stage
aside first. The storage must be a folder that every node sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from jobs.command import Progress, commit, write_atomically

if TYPE_CHECKING:
    from ray.train import UserCallback

    from crsm.config import Config
    from crsm.data.tokenizer import Tokenizer
    from crsm.model import Checkpoint
    from crsm.tasks import Task
    from crsm.training.loop import LoopState, Point
    from crsm.training.stage import Stage

STAGES = ("stage_1", "stage_2", "stage_3", "stage_4")

NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the run; the settings' name if not given. A run goes on."),
]
StorageOption = Annotated[
    Path | None,
    typer.Option("--storage", metavar="DIR", help="Where runs lie; train.storage_path if not given."),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="DIR", help="Where to start; the previous stage of the run if not given."),
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh/--resume", help="Put aside what this run has of the stage and start anew, or go on where it stopped."
    ),
]

PROGRESS_FILE = "progress.jsonl"

_MAX_FAILED_STARTS = 3
"""Times that workers may fail to start; Ray Train's own default waits for ever."""
_UNWATCHED = ("log_every", "evaluate_every", "checkpoint_every")
"""Settings of a stage that do not change its course."""


# ------------------------------------------------------------------------------------------------------- a stage's run


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished stage."""

    stage: str
    checkpoint: Path
    report: dict[str, Any]
    """This stage's part of the checkpoint's report."""
    had_finished: bool
    """Nothing was trained: an earlier start had finished it."""


def run_folder(storage: str | Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        ValueError: the name is not that of a folder, or the storage is not a folder's path.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"name = {name!r}; allowed: the name of one folder")
    if "://" in str(storage):
        raise ValueError(f"storage = {str(storage)!r}; allowed: a folder that every node sees")
    return Path(storage).expanduser().resolve() / name


def locate(settings: Config, storage: Path | None, name: str | None) -> tuple[Path, str]:
    """Storage and name of a run from the options of a job, or else from the settings."""
    return storage or Path(settings.train.storage_path), name or settings.name


def previous_checkpoint(stage: str, storage: str | Path, name: str) -> Path:
    """The checkpoint of the nearest earlier stage of the same run.

    Raises:
        ValueError: there is none.
    """
    before = STAGES[: STAGES.index(stage)]
    paths = [run_folder(storage, name) / earlier / "checkpoint" for earlier in reversed(before)]
    for path in paths:
        if (path / "config.json").is_file():
            return path
    raise ValueError(
        f"no checkpoint of {' or '.join(reversed(before))} in {run_folder(storage, name)}; allowed: run one of them "
        "first, or --checkpoint DIR for another one"
    )


def put_aside(folder: Path) -> None:
    """Moves what a stage left, and its curves, to the first free ``<stage>.old-N``."""
    if not folder.exists():
        return
    free = next(n for n in range(1, 1 << 20) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.old-{free}"))
    curves = folder.parent / "tensorboard" / folder.name
    if curves.exists():
        curves.rename(curves.with_name(f"{folder.name}.old-{free}"))


def train_stage(
    stage: str,
    config: Config,
    input_checkpoint: str | Path | None,
    storage_path: str | Path,
    run_name: str,
    *,
    rollouts: Path | None = None,
    folder_name: str | None = None,
) -> Outcome:
    """Trains one stage to its end, going on where an earlier start stopped.

    Args:
        stage: ``stage_1`` to ``stage_4``.
        config: all settings.
        input_checkpoint: what the stage starts from; None only for stage 1, which then makes a new model.
        storage_path: where runs lie.
        run_name: this run.
        rollouts: the data of stage 3.
        folder_name: the stage's folder inside the run; None: its name.

    Raises:
        ValueError: the input does not fit, the run was begun with other settings, or the cluster is too small.
        FloatingPointError: training left the finite numbers.
        OSError: the storage is full or cannot be written.
    """
    if stage not in STAGES:
        raise ValueError(f"stage = {stage!r}; allowed: {', '.join(STAGES)}")
    if input_checkpoint is None and stage != "stage_1":
        raise ValueError(f"{stage} starts from a checkpoint; allowed: that of an earlier stage")
    folder = run_folder(storage_path, run_name) / (folder_name or stage)
    source = None if input_checkpoint is None else _resolve(input_checkpoint)
    work = _Work(
        stage=stage,
        config=config.model_dump(mode="json"),
        input_checkpoint=None if source is None else str(source),
        folder=str(folder),
        rollouts=None if rollouts is None else str(rollouts.resolve()),
        fingerprint=_fingerprint(stage, config, source, rollouts),
        commit=commit(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "run.json"
    if begun.is_file():
        from crsm.training.loop import check_fingerprint

        try:
            check_fingerprint(json.loads(begun.read_text(encoding="utf-8")), work.fingerprint, str(folder))
        except ValueError as error:
            raise ValueError(f"{error}; allowed: the same settings, another --name, or --fresh") from error
    else:
        write_atomically(begun, json.dumps(work.fingerprint, indent=1, ensure_ascii=False) + "\n")
    if not work.output.exists():
        _require_workers(work, config)
        with cluster():
            _fit(work, config)
        if not (work.output / "config.json").is_file():
            raise RuntimeError(f"{stage} ended without a checkpoint at {work.output}")
        return Outcome(stage, work.output, _read_report(work), had_finished=False)
    return Outcome(stage, work.output, _read_report(work), had_finished=True)


def _resolve(checkpoint: str | Path) -> Path:
    from crsm.model import resolve_checkpoint

    return resolve_checkpoint(checkpoint).resolve()


def _read_report(work: _Work) -> dict[str, Any]:
    description = json.loads((work.output / "config.json").read_text(encoding="utf-8"))
    return dict(description["report"][work.stage])


def plain_settings(config: Config, sections: Collection[str]) -> dict[str, Any]:
    """Some sections of the settings as JSON knows them."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name in sections}


def weights_hash(checkpoint: str | Path) -> str:
    """Start of the sha256 of a checkpoint's weights, as its ``config.json`` names it."""
    description = json.loads((_resolve(checkpoint) / "config.json").read_text(encoding="utf-8"))
    return str(description["files"]["model.safetensors"]["sha256"][:16])


def _fingerprint(stage: str, config: Config, source: Path | None, rollouts: Path | None) -> dict[str, Any]:
    """The settings and data that decide a stage's course, as plain data."""
    sections = {"seed", "model", "tokenizer", "tasks", stage}
    if stage in ("stage_3", "stage_4"):
        sections |= {"search", "deliberation", "sampling"}
    tree = plain_settings(config, sections)
    tree[stage] = {name: value for name, value in tree[stage].items() if name not in _UNWATCHED}
    if source is not None:
        tree["input checkpoint"] = weights_hash(source)
    if rollouts is not None:
        import hashlib

        with open(rollouts, "rb") as file:
            tree["roll-outs"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return dict(json.loads(json.dumps(tree)))


# -------------------------------------------------------------------------------------------------------------- cluster


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A Ray session: the one that is there, the cluster that ``RAY_ADDRESS`` names, or a new one on this machine.

    What was not started here is left running. What a stage has to say comes through its ``progress.jsonl``, and what
    goes wrong as an exception; Ray's own processes write their logs where Ray keeps them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train moves its workers to a folder of its own; relative paths in the settings mean the folder of the command.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how late the end of a stage is noticed
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")  # a busy machine imports slowly
    from actors.cluster import start_ray

    with start_ray():
        yield


def require_resources(need: Mapping[str, float], what: str) -> None:
    """Finds out now, and not by waiting for ever, whether the cluster has what is needed, used or not.

    Without a Ray session it is the local cluster to come that is looked at; a cluster behind ``RAY_ADDRESS`` can only
    be asked once it is connected to.

    Raises:
        ValueError: it has less; what is asked and what is there are named.
    """
    import ray

    from actors.cluster import MIN_CPUS
    from crsm.config import core_count

    if ray.is_initialized():
        there = dict(ray.cluster_resources())
    elif os.environ.get("RAY_ADDRESS", "local") == "local":
        import torch

        there = {"CPU": float(max(core_count(), MIN_CPUS)), "GPU": float(torch.cuda.device_count())}
    else:
        return
    for resource, amount in need.items():
        if there.get(resource, 0.0) < amount:
            raise ValueError(
                f"{what} asks {amount:g} {resource}; the cluster has {there.get(resource, 0.0):g}. "
                "Allowed: fewer workers, or a larger cluster"
            )


def _require_workers(work: _Work, config: Config) -> None:
    workers = float(config.train.workers)
    need = {"CPU": workers} | ({"GPU": workers} if config.train.use_gpu else {})
    require_resources(need, f"{work.stage} with train.workers = {config.train.workers}")


# ----------------------------------------------------------------------------------------------------------- the driver


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker is told."""

    stage: str
    config: dict[str, Any]
    input_checkpoint: str | None
    folder: str
    rollouts: str | None
    fingerprint: dict[str, Any]
    commit: str

    @property
    def output(self) -> Path:
        return Path(self.folder) / "checkpoint"


def _fit(work: _Work, config: Config) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    settings = config.train
    _require_workers(work, config)
    folder = Path(work.folder)
    trainer = TorchTrainer(
        _train,
        train_loop_config=dataclasses.asdict(work),
        scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=settings.use_gpu),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=_MAX_FAILED_STARTS
            ),
            callbacks=[_failure_callback(folder / PROGRESS_FILE, settings.max_failures)],
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with _watched(work, int(work.config[work.stage]["steps"])), _own_interrupt():
        try:
            failure = trainer.fit().return_value
        except TrainingFailedError as error:
            _raise_cause(error)
    if failure:
        raise {"FloatingPointError": FloatingPointError, "ValueError": ValueError}[failure["kind"]](failure["message"])


def _raise_cause(error: Exception) -> NoReturn:
    """Raises what went wrong in a worker as what it is, where the user or the machine can do something about it."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, OSError) and failure.errno is not None:
            raise OSError(failure.errno, failure.strerror, failure.filename) from error
        for kind in (OSError, ValueError, FloatingPointError):
            if isinstance(failure, kind):
                raise kind(str(failure)) from error
    raise error


def _failure_callback(path: Path, max_failures: int) -> UserCallback:
    """Tells the driver why a worker group is started anew; runs in Ray Train's controller."""
    from ray.train import UserCallback

    class TellFailures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, failure in sorted(worker_exceptions.items()):
                text = (str(failure).splitlines() or [""])[0]
                what = f"worker {rank} failed: {type(failure).__name__}: {text} (train.max_failures = {max_failures})"
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"say": what}) + "\n")

    return TellFailures()


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ray Train takes over Ctrl-C, keeps it, and leaves with status 0; here it stays an interruption."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _watched(work: _Work, steps: int) -> Iterator[None]:
    """Shows what the worker of rank 0 writes into ``progress.jsonl``."""
    path = Path(work.folder) / PROGRESS_FILE
    position = path.stat().st_size if path.exists() else 0
    ended = threading.Event()

    def read() -> Iterator[dict[str, Any]]:
        nonlocal position
        if path.exists():
            with open(path, encoding="utf-8") as file:
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    position = file.tell()
                    with contextlib.suppress(ValueError):  # cut short by the death of its writer
                        yield json.loads(line)

    def show(progress: Progress, message: dict[str, Any]) -> None:
        if "say" in message:
            progress.say(f"{work.stage}: {message['say']}")
        else:
            progress.update(int(message.pop("step")), **message)

    def watch() -> None:
        # The bar's clock starts with the training, not with the starting of workers.
        while not (first := list(read())) and not ended.wait(0.5):
            pass
        with Progress(work.stage, steps) as progress:
            for message in first:
                show(progress, message)
            while not ended.wait(0.5):
                for message in read():
                    show(progress, message)
            for message in read():
                show(progress, message)

    workers = work.config["train"]["workers"]
    print(f"{work.stage}: starts {workers} worker{'s' if workers > 1 else ''}", file=sys.stderr, flush=True)
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ----------------------------------------------------------------------------------------------------------- the worker


def _train(told: dict[str, Any]) -> dict[str, str] | None:
    """Runs on every worker. What is the user's to change comes back as data: a restart would only repeat it."""
    import ray.train

    world = ray.train.get_context().get_world_size()
    try:
        _train_and_save(_Work(**told))
    except FloatingPointError as error:  # raised on all workers or on none
        return {"kind": "FloatingPointError", "message": str(error)}
    except ValueError as error:
        if world > 1:  # the other workers may be waiting for this one
            raise
        return {"kind": "ValueError", "message": str(error)}
    return None


def _train_and_save(work: _Work) -> None:
    import ray.train
    import ray.train.torch
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from crsm.config import core_count, parse_config
    from crsm.training.loop import run_stage

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = parse_config(work.config, source="the run's settings")
    torch.set_num_threads(config.train.threads or max(1, core_count() // context.get_local_world_size()))
    built = build_stage(work, config)
    stage = built.stage
    device = ray.train.torch.get_device()
    stage.to(device)
    module: torch.nn.Module = stage
    if world > 1:
        # A worker's part of a batch may leave a part of the model unused (no judged row: no critic).
        module = DistributedDataParallel(
            stage, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=True
        )
    resume = _latest_state(work)
    reporter = _Reporter(work, resume.step if resume else 0, active=rank == 0)
    reporter.say("starts training" if resume is None else f"goes on from step {resume.step}")
    result = run_stage(
        stage,
        rank=rank,
        world=world,
        module=module,
        resume=resume,
        fingerprint=work.fingerprint,
        on_log=reporter.log,
        on_evaluate=reporter.evaluation,
        on_checkpoint=lambda state: _report(state, rank),
    )
    if rank == 0:
        stage.cpu()
        _save(work, built, result.report(), reporter.say)
    reporter.close()


def _report(state: LoopState, rank: int) -> None:
    """Hands a state to Ray Train; a barrier, called by all workers at the same steps."""
    import ray.train

    from crsm.training.loop import STATE_FILE

    metrics = {"step": state.step}
    if rank != 0:
        ray.train.report(metrics, checkpoint=None)
        return
    with tempfile.TemporaryDirectory(prefix="crsm-state-") as folder:
        state.save(Path(folder) / STATE_FILE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _latest_state(work: _Work) -> LoopState | None:
    import ray.train

    from crsm.training.loop import STATE_FILE, LoopState

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return LoopState.load(Path(folder) / STATE_FILE, work.stage, work.fingerprint)


@dataclass(frozen=True, slots=True)
class _Built:
    stage: Stage
    tasks: list[Task]
    tokenizer: Tokenizer
    previous: Checkpoint | None


def build_stage(work: _Work, config: Config) -> _Built:
    """The stage with its model and data, the same on every worker."""
    import torch

    from crsm.data.tokenizer import build_tokenizer
    from crsm.model import build_model, load_checkpoint
    from crsm.tasks import build_tasks
    from crsm.training.assembly import AssemblyStage
    from crsm.training.backbone import BackboneStage
    from crsm.training.dynamics import DynamicsStage
    from crsm.training.judgment import JudgmentStage

    tasks = build_tasks(config.tasks)
    previous = None
    if work.input_checkpoint is None:
        tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer)
    else:
        # What a stage trains from the beginning may have other settings than the checkpoint's: another writer needs
        # no other backbone.
        renewable = {"stage_2": ("world_model",), "stage_4": ("writer",)}.get(work.stage, ())
        torch.manual_seed(config.seed)
        previous = load_checkpoint(work.input_checkpoint, config=config, renewable=renewable)
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
            rollouts = read_rollouts(Path(work.rollouts))
            stage = JudgmentStage(model, config.stage_3, config.seed, tasks, tokenizer, rollouts)
        case _:
            length = config.deliberation.plan_length
            stage = AssemblyStage(model, config.stage_4, config.seed, tasks, tokenizer, length)
    return _Built(stage, tasks, tokenizer, previous)


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


def _save(work: _Work, built: _Built, report: dict[str, Any], say: Callable[[str], None]) -> None:
    from crsm.model import Checkpoint, save_checkpoint
    from crsm.training.calibration import calibrate_gates

    model, previous = built.stage.model.eval(), built.previous
    horizon = report.get("trust_horizon", previous.trust_horizon if previous else None)
    checkpoint = Checkpoint(model, built.tokenizer, horizon, (previous.model_version if previous else 0) + 1)
    if work.stage == "stage_4":
        settings = model.config.stage_4
        may_open, why = _gates_may_open(previous, model.config)
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
        summary = Path(work.rollouts).with_suffix(".json")
        report["rounds"] = json.loads(summary.read_text(encoding="utf-8"))["rounds"]
    report["commit"] = work.commit
    whole = (dict(previous.report) if previous else {}) | {work.stage: _finite(report)}
    say("saves the checkpoint")
    save_checkpoint(dataclasses.replace(checkpoint, report=whole), work.output)


def _gates_may_open(previous: Checkpoint | None, config: Config) -> tuple[bool, str]:
    judged = (previous.report if previous else {}).get("stage_3")
    if judged is None:
        return False, "stage 3 has not measured the pairwise branch accuracy of this model"
    accuracy, bar = judged.get("branch_accuracy"), config.stage_3.gate_accuracy
    if accuracy is None or not accuracy >= bar:
        return False, f"pairwise branch accuracy {accuracy} is below stage_3.gate_accuracy = {bar}"
    return True, ""


def _finite(value: Any) -> Any:
    """Plain data without NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class _Reporter:
    """Curves for TensorBoard, and lines for the driver; silent on all workers but the first."""

    def __init__(self, work: _Work, step: int, active: bool) -> None:
        self._writer: Any = None
        self._lines: Any = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(work.folder)
        self._writer = SummaryWriter(str(folder.parent / "tensorboard" / folder.name), purge_step=step + 1)
        self._lines = open(folder / PROGRESS_FILE, "a", encoding="utf-8")

    def log(self, point: Point) -> None:
        figures = {"loss": point["loss"], "lr": point["lr"], "tokens/s": point["tokens_per_second"]}
        self._write({"step": int(point["step"]), **figures})
        self._scalars(point)

    def evaluation(self, point: Point) -> None:
        shown = {name: value for name, value in point.items() if name not in ("step", "seconds")}
        text = ", ".join(f"{name.removeprefix('valid/')} {value:.4g}" for name, value in list(shown.items())[:12])
        more = f", and {len(shown) - 12} more" if len(shown) > 12 else ""
        self.say(f"step {int(point['step'])}, held out: {text}{more}")
        self._scalars(point)

    def say(self, text: str) -> None:
        self._write({"say": text})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._lines.close()

    def _write(self, message: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(message) + "\n")
            self._lines.flush()

    def _scalars(self, point: Point) -> None:
        if self._writer is not None:
            for name, value in point.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(point["step"]))


# ----------------------------------------------------------------------------------------------------------------- jobs


@contextlib.contextmanager
def one_line_failure() -> Iterator[None]:
    """Training that left the finite numbers is one line and status 1, not a traceback."""
    try:
        yield
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None


def describe_outcome(outcome: Outcome) -> str:
    """A finished stage in one line."""
    report = outcome.report
    how = "had finished" if outcome.had_finished else "finished"
    loss = report.get("loss")
    figures = "" if loss is None else f", loss {loss:.4g}"
    return (
        f"{outcome.stage} {how}: {report['steps']} steps in {report['seconds']:.0f} s{figures}, "
        f"{report['tokens_per_second']:,.0f} tokens/s -> {outcome.checkpoint}"
    )
