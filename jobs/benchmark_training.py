"""Training beside a peer of the same size, in one run: tokens a second, model FLOPs utilisation, loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, load_settings, run, write_result

if TYPE_CHECKING:
    from jobs.speed.rows import Row


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    peer: Annotated[
        str, typer.Option("--peer", metavar="NAME", help="mamba_ssm, mamba2, gpt2, or none.")
    ] = "mamba_ssm",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Of each.")] = 200,
    block: Annotated[int, typer.Option("--block", min=1, help="Steps until it is the other one's turn.")] = 10,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, or auto.")] = "auto",
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draws both loss curves.")] = None,
) -> None:
    """Stage 1 of a config beside a peer: same rows in the same order, same optimizer, in turns on one device.

    A peer that is not installed is named, and ours is measured alone.
    """
    settings = load_settings(config, overrides, seed)

    from crsm.config import core_count
    from crsm.devices import pick_device
    from crsm.threads import use_threads
    from jobs.peers.language_models import PEERS
    from jobs.speed import training_pair
    from jobs.speed.rows import print_rows

    if peer not in (*PEERS, "none"):
        raise ValueError(f"peer = {peer!r}; allowed: {', '.join(PEERS)}, none")
    where = pick_device(device)
    use_threads(settings.train.threads or core_count())
    with Progress(f"training beside {peer}", 2 * steps) as progress:
        found = training_pair.measure(settings, peer, steps, block, where, progress)
    row: Row = training_pair.row_of(found, settings, where)
    print_rows(f"stage 1 of {settings.name}, {settings.train.precision}, on {found.device_name}", [row])
    results: dict[str, Any] = training_pair.plain(found, row)
    if picture is not None:
        training_pair.draw(found, picture)
    write_result("benchmark_training", settings, settings.seed, results, json)


if __name__ == "__main__":
    run(main)
