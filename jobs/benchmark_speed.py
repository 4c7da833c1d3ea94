"""Speed beside the peers, in one run: search, training, decoding; and of the actor system beside itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import (
    ROOT,
    ConfigOption,
    JsonOption,
    Progress,
    SeedOption,
    SetOption,
    load_settings,
    run,
    write_result,
)

if TYPE_CHECKING:
    from jobs.speed.roofline import Roofline
    from jobs.speed.rows import Row

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Speed beside the peers, measured in turns in one run, and beside what the machine allows.",
)

ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="Threads of everyone; 0: all cores.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Tiny shapes: whether it runs. The figures mean nothing.")]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda, or auto: cuda if there is one.")
]
LLAMA = ROOT / "build" / "llama"

Rows = Callable[["Roofline", int, Progress], "list[Row]"]


@app.command()
def search(
    peer_python: Annotated[
        str | None,
        typer.Option("--peer-python", metavar="PATH", help="Interpreter that has mctx and JAX; none: this one."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="NAME", help="Whose deliberations are timed.")
    ] = "nano",
    threads: ThreadsOption = 0,
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Simulations a second beside mctx with the same network, and the latency of a deliberation."""

    def rows(roofline: Roofline, seed: int, progress: Progress) -> list[Row]:
        import sys

        from jobs.speed.search_speed import search_rows

        return search_rows(
            roofline,
            seed=seed,
            peer_python=peer_python or sys.executable,
            checkpoint=checkpoint,
            progress=progress,
            quick=quick,
        )

    _measure("search", rows, "cpu", threads, quick, config, overrides, seed, json)


@app.command()
def train(
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Training tokens a second beside transformers, or beside mamba-ssm on a GPU."""

    def rows(roofline: Roofline, seed: int, progress: Progress) -> list[Row]:
        from jobs.speed.train_speed import train_rows

        return train_rows(roofline, seed=seed, progress=progress, quick=quick)

    _measure("train", rows, device, threads, quick, config, overrides, seed, json)


@app.command()
def decode(
    llama_bench: Annotated[
        Path | None,
        typer.Option(
            "--llama-bench", metavar="PATH", help="llama.cpp's llama-bench; none: what make llama-bench made."
        ),
    ] = None,
    gguf_dir: Annotated[
        Path | None, typer.Option("--gguf-dir", metavar="DIR", help="Its models; none: likewise.")
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Decoding and prompts beside transformers and llama.cpp, or beside mamba-ssm on a GPU."""

    def rows(roofline: Roofline, seed: int, progress: Progress) -> list[Row]:
        from jobs.speed.decode_speed import decode_rows
        from jobs.speed.peers.llama_cpp import LlamaBench

        llama = LlamaBench(llama_bench or LLAMA / "build" / "bin" / "llama-bench", gguf_dir or LLAMA, roofline.threads)
        return decode_rows(roofline, seed=seed, llama=llama, progress=progress, quick=quick)

    _measure("decode", rows, device, threads, quick, config, overrides, seed, json)


@app.command()
def device(
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="NAME", help="Whose tokens and deliberations are timed.")
    ] = "nano",
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Both systems on one device: search at many trees, and decoding with System 2 on beside off."""

    def rows(roofline: Roofline, seed: int, progress: Progress) -> list[Row]:
        from jobs.speed.device_speed import device_rows

        return device_rows(roofline, seed=seed, checkpoint=checkpoint, progress=progress, quick=quick)

    _measure("device", rows, device, threads, quick, config, overrides, seed, json)


@app.command()
def nonblocking(
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Of both systems: cpu, cuda (in shares), or auto.")
    ] = "cpu",
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """What System 2 costs System 1: the generator actor with planner actors and without, each on a core of its own."""

    def rows(core: int | None, seed: int, progress: Progress) -> list[Row]:
        from jobs.speed.nonblocking_speed import nonblocking_rows

        where: Any = pick_device(device)
        return nonblocking_rows(core, seed=seed, progress=progress, quick=quick, device=where)

    _measure_actors("nonblocking", rows, quick, config, overrides, seed, json)


@app.command()
def pool(
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Many generations in one batch, accuracy by the wall clock, and how soon plans are back after a kill."""

    def rows(core: int | None, seed: int, progress: Progress) -> list[Row]:
        from jobs.speed.pool_speed import pool_rows

        return pool_rows(core, seed=seed, progress=progress, quick=quick)

    _measure_actors("pool", rows, quick, config, overrides, seed, json)


@app.command()
def serve(
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """The served application beside its own engine, under load, and beside clients that misbehave. Loopback only."""

    def rows(core: int | None, seed: int, progress: Progress) -> list[Row]:
        from jobs.speed.serve_speed import serve_rows

        return serve_rows(core, seed=seed, progress=progress, quick=quick)

    from jobs.speed.serve_speed import serve_environment

    with serve_environment():
        _measure_actors("serve", rows, quick, config, overrides, seed, json)


@app.command()
def profile(
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="NAME", help="Whose deliberation is timed.")
    ] = "nano",
    threads: ThreadsOption = 1,
    quick: QuickOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Where the time of training and of a deliberation goes, with the native core and without it."""
    settings = load_settings(config, overrides, seed)

    from crsm.config import core_count
    from crsm.model import load_checkpoint
    from crsm.threads import use_threads
    from jobs.speed.profiles import plain, print_profiles, profiles

    threads = threads or core_count()
    use_threads(threads)
    with Progress("profile") as progress:
        found = profiles(load_checkpoint(checkpoint), seed=settings.seed, progress=progress, quick=quick)
    print_profiles(found, threads)
    results = {"threads": threads, "quick": quick, "profiles": plain(found)}
    write_result("benchmark_speed profile", settings, settings.seed, results, json)


def _measure_actors(
    what: str,
    rows: Callable[[int | None, int, Progress], list[Row]],
    quick: bool,
    config: Path | None,
    overrides: list[str] | None,
    seed: int | None,
    json: str | None,
) -> None:
    """The rows of a generator that has a core to itself, with one thread, while everything else has the others."""
    settings = load_settings(config, overrides, seed)

    from crsm import native
    from crsm.threads import use_threads
    from jobs.speed.pinned_ray import pinned_ray
    from jobs.speed.rows import plain, print_rows

    use_threads(1)
    with Progress(f"speed of {what}") as progress, pinned_ray() as core:
        found = rows(core, settings.seed, progress)
    results = {"quick": quick, "native": native.describe(), "pinned": core is not None}
    print_rows(f"{what}" + (", TINY LOADS" if quick else ""), found)
    results["rows"] = [plain(row) for row in found]
    write_result(f"benchmark_speed {what}", settings, settings.seed, results, json)


def _measure(
    what: str,
    rows: Rows,
    device: str,
    threads: int,
    quick: bool,
    config: Path | None,
    overrides: list[str] | None,
    seed: int | None,
    json: str | None,
) -> None:
    settings = load_settings(config, overrides, seed)
    device = pick_device(device)

    from crsm import native
    from crsm.config import core_count
    from crsm.threads import use_threads
    from jobs.speed import roofline as limits
    from jobs.speed.rows import plain, print_rows

    threads = threads or core_count()
    use_threads(threads)
    with Progress(f"speed of {what}") as progress:
        roofline = limits.measure(threads, quick, device)
        found = rows(roofline, settings.seed, progress)
    results: dict[str, Any] = {
        "threads": threads,
        "device": device,
        "quick": quick,
        "native": native.describe(),
        "roofline": {
            "gemm_gflops": roofline.gemm_gflops,
            "gemm": roofline.gemm,
            "read_gbs": roofline.read_gbs,
            "read_gbs_by_bytes": {str(size): rate for size, rate in sorted(roofline.read.items())},
        },
        "rows": [plain(row) for row in found],
    }
    title = f"{what}, {threads} threads: {roofline.gemm_gflops:,.0f} GFLOP/s, {roofline.read_gbs:.1f} GB/s"
    print_rows(title + (", TINY SHAPES" if quick else ""), found)
    write_result(f"benchmark_speed {what}", settings, settings.seed, results, json)


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda`` from ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {name!r}; allowed: auto, cpu, cuda")
    if name == "cpu":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ValueError("device = 'cuda': this machine has none that torch can use; allowed: auto, cpu")
    return "cpu"


if __name__ == "__main__":
    run(app)
