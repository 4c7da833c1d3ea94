"""Held-out text: a checkpoint beside language models of Hugging Face of its size, trained on its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import CheckpointOption, limit_threads, load_with_settings, print_table
from jobs.command import ConfigOption, JsonOption, SeedOption, SetOption, run, write_result
from jobs.peers.training import PeerTraining, train_peer

if TYPE_CHECKING:
    from crsm.model import Checkpoint

NO_PEER = "pip install transformers"


def main(
    checkpoint: CheckpointOption,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", metavar="NAME", help="mamba2 or gpt2; repeatable; none: both.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Held-out rows of each source, evenly spread.")] = 10**9,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="Where the peers' training is kept; it goes on from there.")
    ] = Path("runs/peers"),
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that train a peer together.")] = 2,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch, in each of them.")] = 1,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile for the peers; needs a C++ compiler.")
    ] = True,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Bits per byte of held-out text: System 1 beside peers of equal size that see the same tokens.

    A peer is trained by stage 1 of the checkpoint's settings: same rows, steps, optimizer and schedule. Its learning
    rate may be another one (--set stage_1.optimizer.lr=0.001). Started again, the command goes on where it was.
    """
    loaded = load_with_settings(checkpoint, config, overrides, seed)
    settings = loaded.config
    if settings.stage_1.text is None:
        raise ValueError(f"stage_1.text of {checkpoint!r} is not set; allowed: a checkpoint trained on shards of text")

    try:
        from jobs.peers.language_models import TEXT_PEERS, language_parameters
    except ImportError as error:
        raise ValueError(f"the peers need transformers: {NO_PEER}") from error

    names = peer or list(TEXT_PEERS)
    if unknown := [name for name in names if name not in TEXT_PEERS]:
        raise ValueError(f"peer {unknown[0]!r}; allowed: {', '.join(TEXT_PEERS)}")
    results: dict[str, Any] = {"checkpoint": {"name": checkpoint, "weights": loaded.weights_hash}, "models": {}}
    limit_threads()
    trained = loaded.report.get("stage_1", {})
    results["models"]["crsm"] = {
        "parameters": language_parameters(loaded.model),
        "steps": trained.get("steps"),
        "training_seconds": trained.get("seconds"),
        "training_tokens_per_second": trained.get("tokens_per_second"),
        "lr": settings.stage_1.optimizer.lr,
        **_own_figures(loaded, rows),
    }
    for name in names:
        where = folder / f"{settings.name}-{name}"
        training = PeerTraining(name, checkpoint, config, overrides, seed, where, workers, threads, compiled)
        results["models"][name] = _peer_figures(training, settings.stage_1.optimizer.lr, rows)
    _print(results["models"])
    write_result("benchmark_text", settings, settings.seed, results, json)


def _own_figures(loaded: Checkpoint, rows: int) -> dict[str, float]:
    import torch

    from crsm.tasks import build_tasks
    from crsm.training.backbone import language_and_value_loss
    from crsm.training.rows import BackboneRows
    from crsm.training.stage import scalar

    settings = loaded.config
    held_out = BackboneRows(settings.stage_1, settings.seed, build_tasks(settings.tasks), loaded.tokenizer)
    with torch.no_grad():
        return held_out.held_out_text(lambda part: scalar(language_and_value_loss(loaded.model, part)[0]), rows)


def _peer_figures(training: PeerTraining, lr: float, rows: int) -> dict[str, Any]:
    from jobs.peers.language_models import language_parameters

    stage, result = train_peer(training)
    return {
        "parameters": language_parameters(stage.peer),
        "steps": result.steps,
        "training_seconds": result.seconds,
        "training_tokens_per_second": result.tokens_per_second,
        "lr": lr,
        **stage.held_out_text(rows),
    }


def _print(models: dict[str, Any]) -> None:
    prefix = "valid/bits_per_byte/"
    sources = [name.removeprefix(prefix) for name in models["crsm"] if name.startswith(prefix)]
    print_table(
        "held-out text: bits per byte (over ours)",
        ["model", "parameters", *sources, "training tokens/s"],
        (
            (
                name,
                f"{figures['parameters']:,}",
                *(
                    f"{figures[prefix + source]:.4f} ({models['crsm'][prefix + source] / figures[prefix + source]:.3f})"
                    for source in sources
                ),
                f"{figures['training_tokens_per_second'] or 0:,.0f}",
            )
            for name, figures in models.items()
        ),
    )


if __name__ == "__main__":
    run(main)
