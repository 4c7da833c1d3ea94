"""Two models trained in turns by the same loop on the same rows: how fast each goes, and how its loss falls.

Each has a thread, of which one runs at a time: a block of steps of ours, a block of the peer's, and so on, so that
whatever else the machine does meets both. The clock of a loop stands still while it waits for its turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crsm.config import Config
from crsm.scaling.arithmetic import token_cost
from crsm.scaling.devices import DEVICES
from crsm.scaling.memory import kernel_chunk
from crsm.training.loop import Point, run_stage
from crsm.training.stage import Stage
from jobs.speed.roofline import measure_gemm
from jobs.speed.rows import Row, make_row
from jobs.speed.rows import plain as plain_row
from jobs.speed.timing import median

if TYPE_CHECKING:
    from jobs.command import Progress

_NEVER = 10**9
_WARM_UP = 1
"""Blocks that do not count: kernels are compiled, memory is allocated."""


@dataclass(slots=True)
class Found:
    """What both did."""

    peer: str
    device_name: str
    tokens_per_step: float
    parameters: dict[str, int] = field(default_factory=dict)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    flops_per_token: float = 0.0
    peak: float | None = None
    """Operations a second by the data sheet; None: the device is in no list."""
    gemm: float = 0.0
    """Operations a second of a large matrix product, measured."""
    note: str | None = None

    def rates(self, name: str) -> list[float]:
        """Tokens a second, block by block."""
        return [point["tokens_per_second"] for point in self.curves.get(name, [])[_WARM_UP:]]


class Turns:
    """Lets one of several threads run at a time, in a fixed order; who has ended is passed over."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._changed = list(names), threading.Condition()
        self._turn = 0

    def wait(self, name: str) -> None:
        """Blocks until it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._names[self._turn] == name)

    def pass_on(self, name: str) -> None:
        """Ends this one's turn, and waits for its next."""
        with self._changed:
            self._turn = (self._turn + 1) % len(self._names)
            self._changed.notify_all()
        self.wait(name)

    def leave(self, name: str) -> None:
        """Ends this one's turns."""
        with self._changed:
            place = self._names.index(name)
            del self._names[place]
            self._turn = 0 if not self._names else (place % len(self._names))
            self._changed.notify_all()


def in_turns(work: dict[str, Callable[[Callable[[], None]], None]]) -> None:
    """Does several things in turns; each is told how to pass its turn on.

    Raises:
        Exception: the first that one of them raised, when all have ended.
    """
    turns, failures = Turns(list(work)), []

    def run(name: str) -> None:
        turns.wait(name)
        try:
            work[name](lambda: turns.pass_on(name))
        except Exception as error:
            failures.append(error)
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def measure(config: Config, peer: str, steps: int, block: int, device: torch.device, progress: Progress) -> Found:
    """Trains both for so many steps.

    Raises:
        ValueError: the settings do not fit together.
    """
    from crsm.data.tokenizer import build_tokenizer
    from crsm.model import CRSM, build_model
    from crsm.tasks import build_tasks
    from crsm.training.backbone import BackboneStage
    from crsm.training.execution import prepare
    from jobs.peers.language_models import NotInstalledError, PeerStage, build_peer, language_parameters

    settings = config.stage_1.model_copy(
        update={"steps": steps, "log_every": block, "checkpoint_every": _NEVER, "evaluate_every": _NEVER}
    )
    tasks = build_tasks(config.tasks)
    tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
    torch.manual_seed(config.seed)
    padded = config.model.backbone.vocab_size > tokenizer.vocab_size  # no text has the rows beyond
    model = CRSM(config) if padded else build_model(config, tokenizer)
    sizes = model.config.model.backbone
    ours = BackboneStage(model, settings, config.seed, tasks, tokenizer)
    modules = {"ours": prepare(ours, config.train, world=1, device=device)}
    stages: dict[str, Stage] = {"ours": ours}
    found = Found(peer, _name(device), 0.0, {"ours": language_parameters(model)})
    if peer != "none":
        try:
            torch.manual_seed(config.seed)
            theirs = PeerStage(build_peer(peer, sizes), settings, config.seed, tasks, tokenizer)
            theirs.to(device)
            theirs.precision = config.train.precision
            stages["peer"] = modules["peer"] = theirs
            found.parameters["peer"] = language_parameters(theirs.peer)
        except NotInstalledError as error:
            found.note = f"without {peer}: {error}"
            progress.say(found.note)
    found.curves = {name: [] for name in stages}

    def training(name: str) -> Callable[[Callable[[], None]], None]:
        def train(pass_on: Callable[[], None]) -> None:
            def log(point: Point) -> None:
                found.curves[name].append(point)
                done = sum(int(curve[-1]["step"]) for curve in found.curves.values() if curve)
                rate = point["tokens_per_second"]
                progress.update(done, whose=name, loss=point["loss"], tokens_per_second=rate)
                pass_on()

            stages[name].evaluate = stages[name].finish = dict  # type: ignore[method-assign]
            run_stage(stages[name], module=modules[name], on_log=log)

        return train

    in_turns({name: training(name) for name in stages})
    # What a token costs is counted for text: every token of it is a target.
    kernels = "cuda" if device.type == "cuda" else "native"
    found.flops_per_token = token_cost(sizes, kernel_chunk(sizes, kernels)).train_flops()  # type: ignore[arg-type]
    found.peak = peak_of(found.device_name, config.train.precision)
    size = 8192 if device.type == "cuda" else 1024
    found.gemm = 1e9 * max(measure_gemm(size, device.type, 0.5).values())
    return found


def peak_of(name: str, precision: str) -> float | None:
    """Of a GPU as its driver names it (``NVIDIA H200``), by the data sheets of :mod:`crsm.scaling.devices`."""
    words = name.replace("-", " ").split()
    known = [device for key, device in DEVICES.items() if key.split("-")[0] in words]
    return known[0].flops(precision) if known else None


def _name(device: torch.device) -> str:
    from jobs.command import machine

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine()["cpu"])


def row_of(found: Found, config: Config, device: torch.device) -> Row:
    """Tokens a second; the limit is the peak (measured, if no data sheet is known) over a token's operations."""
    peak = found.peak or found.gemm
    source = "the data sheet" if found.peak else "a measured matrix product"
    notes = [found.note] if found.note else []
    for name, curve in found.curves.items():
        notes.append(
            f"{name}: loss {curve[0]['loss']:.4f} to {curve[-1]['loss']:.4f} in {int(curve[-1]['step'])} steps"
        )
    rates = found.rates("ours")
    return make_row(
        f"train {config.name}, {config.train.precision}",
        "tokens/s",
        torch.get_num_threads(),
        rates,
        peer_name=None if found.peer == "none" else found.peer,
        peer=found.rates("peer"),
        limit=peak / found.flops_per_token,
        limit_by=f"{source}: {peak / 1e12:,.4g} TFLOP/s at {found.flops_per_token / 1e6:,.0f} MFLOP a token (MFU)",
        note="; ".join(notes) or None,
        device=str(device),
    )


def plain(found: Found, row: Row) -> dict[str, Any]:
    """The result."""
    mfu = {}
    for name in found.curves:
        rate = median(found.rates(name))
        if rate is not None:
            done = rate * found.flops_per_token
            mfu[name] = {
                "of_data_sheet": done / found.peak if found.peak else None,
                "of_matrix_product": done / found.gemm,
            }
    return {
        "row": plain_row(row),
        "device": found.device_name,
        "parameters": found.parameters,
        "flops_per_token": found.flops_per_token,
        "mfu": mfu,
        "curves": {
            name: [{key: point[key] for key in ("step", "loss", "tokens_per_second")} for point in curve]
            for name, curve in found.curves.items()
        },
    }


def draw(found: Found, path: Path) -> None:
    """Both curves over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in found.curves.items():
        label = "crsm" if name == "ours" else found.peer
        axes.plot([point["step"] for point in curve], [point["loss"] for point in curve], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
