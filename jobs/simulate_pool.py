"""How many planners a token rate needs: the pool's own scheduling, driven in simulated time."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import print_table
from jobs.command import JsonOption, Progress, run, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actors.simulation import Costs, Demand, Outcome

PLANNERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
STREAMS = (100, 1000, 10_000)
"""Generations that run at once."""
STREAMS_PER_POOL = 1000
"""A generator, and its pool, beyond which there is another one of each."""

# What docs/scaling.md says about every one of these figures.
MEASURED = {"call": 0.8e-3, "per_request": 22e-6}
"""CPU of the pool's process, on the machine of docs/performance.md."""
NANO_BYTES = 99_840
L, D, HP, N = 48, 2048, 4096, 128
"""The 1.3b shape."""
READ_LAYERS = 4
"""Of 48, whose memory a request carries."""


def request_bytes(read_layers: int, element: int) -> int:
    """A request of the 1.3b shape: the residual stream of all layers, and the memory of those that are read."""
    return (L * D + read_layers * HP * N) * element


def shapes() -> dict[str, tuple[Costs, Demand]]:
    """What is simulated: costs, and what a generation asks for."""
    from actors.simulation import Costs, Demand

    nano = Costs(
        overhead=1.0e-3,
        per_step=22.7e-6,
        per_simulation=7.0e-6,
        request_bytes=NANO_BYTES,
        bandwidth=12.5e9,
        latency=0.5e-3,
        call=MEASURED["call"],
        per_request=MEASURED["per_request"],
    )
    large = replace(
        nano,
        overhead=2.0e-3,
        per_step=0.3e-3,
        per_simulation=4.0e-6,
        request_bytes=request_bytes(READ_LAYERS, 2),
        bandwidth=50e9,
    )
    return {"nano, CPU": (nano, Demand(1, 20.0)), "1.3b, GPU": (large, Demand(1, 20.0, plan_every=8))}


def main(
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Simulated and counted.")] = 2.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few planners and generations: only shows that it runs.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="A picture (PNG, SVG, PDF).")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="INTEGER", help="Of values and search times.")] = 0,
    json: JsonOption = None,
) -> None:
    """Simulate planner pools of 1 to 1,000 planners under several demands: hit rate, messages and bytes per second.

    The scheduling is the pool's own; only the planners, the generators and the network are made up, with the figures
    that docs/scaling.md explains. The same seed gives the same result.
    """
    if plot is not None:
        from crsm.evaluation.figures import check_figure_path

        check_figure_path(plot)
    counts, streams = (PLANNERS[:4], STREAMS[:1]) if quick else (PLANNERS, STREAMS)
    cases = [(name, many, planners) for name in shapes() for many in streams for planners in counts]
    rows = []
    with Progress("simulate pool", len(cases)) as progress:
        for done, (name, many, planners) in enumerate(cases, start=1):
            costs, one = shapes()[name]
            rows.append(case(name, planners, replace(one, generations=many), costs, seconds, seed))
            progress.update(done, **{name: rows[-1]["hit_rate"]})
    results: dict[str, Any] = {
        "shapes": {name: {"costs": asdict(costs), "demand": asdict(one)} for name, (costs, one) in shapes().items()},
        "request_bytes_1_3b": sizes(),
        "rows": rows,
    }
    _print(rows)
    if plot is not None:
        draw(rows).savefig(plot, dpi=110)
    write_result("simulate_pool", {"seconds": seconds, "quick": quick}, seed, results, json)


def case(name: str, planners: int, demand: Demand, costs: Costs, seconds: float, seed: int) -> dict[str, Any]:
    """One row: so many planners for so many generations. Pools share nothing, so that one is simulated for all."""
    from actors.simulation import simulate

    pools = min(planners, math.ceil(demand.generations / STREAMS_PER_POOL))
    share = replace(demand, generations=demand.generations // pools)
    outcome: Outcome = simulate(
        planners // pools, share, costs, seconds=seconds, seed=seed, warm_up=0.5, max_batch=64, max_in_flight=2
    )
    return {
        "shape": name,
        "generations": demand.generations,
        "planners": planners,
        "pools": pools,
        "hit_rate": outcome.hit_rate,
        "asked": outcome.asked / max(1, outcome.due),
        "in_time_rate": outcome.in_time / max(1, outcome.due),
        "simulations": outcome.simulations,
        "messages_per_second": outcome.messages_per_second * pools,
        "searches_per_second": outcome.searches_per_second * pools,
        "bytes_per_second": outcome.bytes_per_second * pools,
        "busy": outcome.busy,
        "dispatcher_busy": outcome.dispatcher_busy,
    }


def sizes() -> list[dict[str, Any]]:
    """Bytes of a request of the 1.3b shape, by the layers that are read and the number format."""
    return [
        {"read_layers": layers, "format": name, "bytes": request_bytes(layers, element)}
        for layers in (1, READ_LAYERS, L)
        for name, element in (("bf16", 2), ("fp32", 4))
    ]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Hit rate and messages per second against planners, a column for each shape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        hits, messages = axes[0][column], axes[1][column]
        for many in dict.fromkeys(row["generations"] for row in rows):
            found = [row for row in rows if (row["shape"], row["generations"]) == (name, many)]
            planners = [row["planners"] for row in found]
            hits.plot(planners, [row["hit_rate"] for row in found], marker="o", markersize=3, label=f"{many:,}")
            messages.plot(planners, [row["messages_per_second"] for row in found], marker="o", markersize=3)
        hits.set(title=name, xscale="log", ylim=(0, 1.05))
        messages.set(xlabel="planners", xscale="log", yscale="log")
        for axis in (hits, messages):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("plan hit rate")
    axes[1][0].set_ylabel("requests and plans per second")
    axes[0][0].legend(title="generations", loc="lower right", fontsize="small")
    return figure


def _print(rows: list[dict[str, Any]]) -> None:
    print_table(
        "planner pools in simulated time",
        ["shape", "generations", "planners", "hit rate", "in time", "simulations", "messages/s", "MB/s", "pool busy"],
        (
            (
                row["shape"],
                f"{row['generations']:,}",
                str(row["planners"]),
                f"{row['hit_rate']:.3f}",
                f"{row['in_time_rate']:.3f}",
                f"{row['simulations']:.1f}",
                f"{row['messages_per_second']:,.0f}",
                f"{row['bytes_per_second'] / 1e6:,.0f}",
                f"{row['dispatcher_busy']:.2f}",
            )
            for row in rows
        ),
    )


if __name__ == "__main__":
    run(main)
