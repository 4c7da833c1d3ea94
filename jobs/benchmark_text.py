"""Held-out text: a checkpoint beside language models of Hugging Face of its size, trained on its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import CheckpointOption, limit_threads, load_with_settings, print_table
from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, run, write_result

if TYPE_CHECKING:
    from crsm.model import Checkpoint
    from crsm.training.loop import LoopState, Point

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
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch, for a peer's training.")] = 2,
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

    import torch

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
    torch.set_num_threads(threads)
    for name in names:
        results["models"][name] = _train_peer(name, loaded, folder / f"{settings.name}-{name}", rows, compiled)
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


def _train_peer(name: str, loaded: Checkpoint, folder: Path, rows: int, compiled: bool) -> dict[str, Any]:
    import torch

    from crsm.tasks import build_tasks
    from crsm.training.loop import STATE_FILE, LoopState, run_stage
    from jobs.peers.language_models import PeerStage, build_peer, language_parameters

    settings = loaded.config
    torch.manual_seed(settings.seed)
    model = build_peer(name, loaded.model.config.model.backbone)
    tasks = build_tasks(settings.tasks)
    stage = PeerStage(model, settings.stage_1, settings.seed, tasks, loaded.tokenizer, compiled)
    fingerprint = {
        "peer": name,
        "backbone": loaded.model.config.model.backbone.model_dump(mode="json"),
        "stage_1": settings.stage_1.model_dump(mode="json"),
        "tasks": [task.model_dump(mode="json") for task in settings.tasks],
        "seed": settings.seed,
    }
    path = folder / STATE_FILE
    resume = LoopState.load(path, stage.name, fingerprint) if path.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(f"trains {name}", settings.stage_1.steps, begun=resume.step if resume else 0) as progress:

        def log(point: Point) -> None:
            progress.update(int(point["step"]), loss=point["loss"], tokens_per_second=point["tokens_per_second"])

        def keep(state: LoopState) -> None:
            state.save(path)

        result = run_stage(stage, resume=resume, fingerprint=fingerprint, on_log=log, on_checkpoint=keep)
    stage.eval()
    return {
        "parameters": language_parameters(model),
        "steps": result.steps,
        "training_seconds": result.seconds,
        "training_tokens_per_second": result.tokens_per_second,
        "lr": settings.stage_1.optimizer.lr,
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
