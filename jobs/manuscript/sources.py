"""The result files behind the paper, and the command that makes each of them.

A result file is what a command wrote with ``--json``, made small: figures that the paper does not use for a table, a
figure or a number are left out, and machine paths are cut to their last part. It keeps ``job``, ``commit``, ``seed``,
``machine`` and ``config``, and has ``command`` beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "docs" / "paper"
RESULTS = PAPER / "results"

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """One result file."""

    name: str
    command: str
    """As a reader types it; the result file is what it prints with ``--json``."""
    what: str
    """In the appendix."""
    path: Path | None = None
    """Where it lies, if not with the paper."""
    drop: tuple[str, ...] = ()
    """Parts of ``results`` that are left out."""

    @property
    def file(self) -> Path:
        return self.path or RESULTS / f"{self.name}.json"

    @property
    def arguments(self) -> list[str]:
        """Of ``python``."""
        return self.command.split()[1:]


_BENCHMARK = "python -m jobs.benchmark_reasoning --checkpoint nano --problems 500 --seed 7"
HYPOTHESES = (1, 2, 4, 8)
TASKS = ("path_star", "tree_path")
VARIANTS = (
    ("left_in", "deliberation.withdraw=false", "older writes left in"),
    ("rate_strong", "deliberation.injection_rate=0.2", "four times the injection rate"),
    ("rate_excess", "deliberation.injection_rate=0.5", "ten times the injection rate"),
    ("policy_channel", "deliberation.channel=policy", "the plan's policy mixed into the logits instead"),
)
"""System 2 with one setting changed, a plan at every token."""


_REASONING = "python -m jobs.benchmark_reasoning --checkpoint reasoning --seed 7 --controls none"
KINDS = ("star_2", "star_5", "tree_path", "countdown", "maze", "sudoku", "prosqa")
"""Of the checkpoint ``reasoning``."""
PAIRED = ("star_5", "tree_path", "maze", "countdown")
"""Those of them with accuracy against compute."""
_LATENT = "--set model.world_model.kind=latent --set search.simulations=64"


def _sources() -> Iterable[Source]:
    yield Source(
        "training",
        "python -m jobs.pipeline --config configs/nano.yaml",
        "training of the shipped checkpoint",
        path=ROOT / "crsm" / "assets" / "nano" / "report.json",
    )
    yield Source("path_star", f"{_BENCHMARK} --task path_star --lag 0,1,2", "path-star with all controls")
    yield Source("tree_path", f"{_BENCHMARK} --task tree_path --lag 1", "tree-path with all controls")
    yield Source(
        "tree_path_lags",
        f"{_BENCHMARK} --task tree_path --lag 0,1,2,3,4,5,6 --controls none",
        "tree-path against the lag",
    )
    yield Source(
        "ablate_lag_rate",
        "python -m jobs.ablate --config configs/ablate_lag_rate.yaml",
        "lag and injection rate",
        drop=("table", "output", "files", "command", "wall_seconds"),
    )
    for task in TASKS:
        yield Source(
            f"compute_{task}",
            f"{_BENCHMARK} --task {task} --lag 1 --controls none --compute",
            f"accuracy against compute, {task.replace('_', '-')}",
        )
    for task in TASKS:
        for count in HYPOTHESES:
            yield Source(
                f"hypotheses_{task}_{count}",
                f"{_BENCHMARK} --task {task} --lag 2 --controls none --set deliberation.hypotheses={count}",
                f"hit rate with {count} assumed future{'s' if count > 1 else ''}, {task.replace('_', '-')}",
            )
    for name, setting, what in VARIANTS:
        for task in TASKS:
            yield Source(
                f"{name}_{task}",
                f"{_BENCHMARK} --task {task} --lag 0,1,2 --controls none --set {setting}",
                f"{what}, {task.replace('_', '-')}",
            )
    yield from _of_seven_kinds()
    yield Source("planners", "python -m jobs.simulate_pool", "hit rate against planners, simulated")
    yield Source(
        "steering", "python -m jobs.verify_steering --checkpoint nano --problems 200 --seed 7", "what a write does"
    )
    yield Source(
        "transport", "python -m jobs.verify_transport --checkpoint nano --problems 200 --seed 7", "transport per layer"
    )
    for part, what in (("search", "search beside mctx"), ("train", "training"), ("decode", "decoding and prompts")):
        yield Source(f"speed_{part}", f"python -m jobs.benchmark_speed {part}", f"speed: {what}")
    yield Source("nonblocking", "python -m jobs.benchmark_speed nonblocking", "speed: System 2 on beside off")
    yield Source("pool", "python -m jobs.benchmark_speed pool", "speed: the planner pool, by the wall clock")
    yield Source("chaos", "python -m jobs.chaos --seconds 120 --seed 1", "fault injection", drop=("phases",))
    yield Source(
        "gsm8k_training",
        "python -m jobs.pipeline --config configs/gsm8k_tiny.yaml --set tasks.gsm8k.path=train.jsonl",
        "training on GSM8K",
    )
    yield Source(
        "gsm8k",
        "python -m jobs.benchmark_reasoning --checkpoint runs/gsm8k_tiny/stage_4/checkpoint --task gsm8k"
        " --problems 100 --controls gate_zero --seed 7",
        "GSM8K with shut gates",
    )


def _of_seven_kinds() -> Iterable[Source]:
    for kind in KINDS:
        yield Source(f"seven_{kind}", f"{_REASONING} --problems 1000 --lag 1,2 --task {kind}", f"both systems, {kind}")
    yield Source(
        "seven_star_2_many",
        f"{_REASONING} --problems 20000 --lag 2 --task star_2",
        "path-star beside published figures",
    )
    yield Source(
        "seven_prosqa_public",
        f"{_REASONING} --problems 300 --lag 1,2 --task prosqa --set tasks.prosqa.path=prosqa_valid.json",
        "ProsQA's public validation problems",
    )
    for kind in PAIRED:
        yield Source(
            f"paired_{kind}",
            f"{_REASONING} --problems 300 --lag 1 --task {kind} --compute",
            f"accuracy against compute, {kind}",
        )
    yield Source(
        "latent_paired_star_5",
        f"{_REASONING} --problems 300 --lag 1 --task star_5 --compute {_LATENT}",
        "accuracy against compute with the latent world model, star_5",
    )
    for kind in ("countdown", "maze"):
        yield Source(
            f"latent_{kind}",
            f"{_REASONING} --problems 1000 --lag 1 --task {kind} {_LATENT}",
            f"both systems with the latent world model, {kind}",
        )


SOURCES = {source.name: source for source in _sources()}


def load(sources: Iterable[Source] = SOURCES.values()) -> dict[str, Record]:
    """The result files that are there, by name; what is not there is simply absent.

    Raises:
        ValueError: a file that is no result.
    """
    found = {}
    for source in sources:
        if source.file.is_file():
            record = json.loads(source.file.read_text(encoding="utf-8"))
            missing = {"job", "commit", "seed", "machine", "results"} - set(record)
            if missing:
                raise ValueError(f"{source.file} lacks {', '.join(sorted(missing))}; allowed: what --json writes")
            found[source.name] = record
    return found


def shrink(source: Source, record: Record) -> dict[str, Any]:
    """A fresh result as it is kept with the paper: with its command, and without what the paper has no use for."""
    results = {key: value for key, value in record["results"].items() if key not in source.drop}
    kept = {key: record[key] for key in ("job", "commit", "config", "seed", "machine")}
    shrunk: dict[str, Any] = _shrunk({"command": source.command, **kept, "results": results})
    return shrunk


_HEAVY = frozenset({"samples", "curve", "roofline", "command"})
"""Every sample of a timing, every step of a training; a command with the paths of one machine. (As a number,
``samples`` is what a method costs.)"""


def _shrunk(value: Any, top: bool = True) -> Any:
    if isinstance(value, Mapping):
        heavy = () if top else [key for key in _HEAVY & set(value) if isinstance(value[key], Mapping | list | str)]
        return {key: _shrunk(item, False) for key, item in value.items() if key not in heavy}
    if isinstance(value, list):
        return [_shrunk(item, False) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return value
