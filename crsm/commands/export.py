"""A checkpoint as a Hugging Face repository."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from crsm.commands.options import JsonOption, SetOption, note


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or the name of a shipped one.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option("--dtype", help="Of matrices; vectors stay fp32.")] = "fp32",
    layout: Annotated[
        Literal["crsm", "mamba2", "checkpoint"],
        typer.Option(
            "--layout",
            help="crsm: both systems; mamba2: System 1 alone, as Mamba2ForCausalLM; checkpoint: nothing for others.",
        ),
    ] = "crsm",
    results: Annotated[
        list[Path] | None,
        typer.Option("--results", metavar="FILE", help="Of jobs.benchmark_reasoning, for the model card; repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="report.json of the shards, for the model card; theirs if it is there."
        ),
    ] = None,
    licence: Annotated[str, typer.Option("--licence", metavar="ID", help="Of the weights.")] = "apache-2.0",
    max_shard: Annotated[str, typer.Option("--max-shard", metavar="SIZE", help="Of a file of weights.")] = "5GB",
    overrides: SetOption = None,
    json: JsonOption = None,
) -> None:
    """Write a checkpoint as a Hugging Face repository.

    transformers alone generates with it as System 1, with this package installed as System 2. The folder is itself a
    checkpoint.
    """
    from crsm.release.folder import refuse_existing

    refuse_existing(folder)
    records = [_read(path) for path in results or ()]
    from crsm.model import resolve_checkpoint, save_checkpoint
    from crsm.release.export import DTYPES, export_checkpoint
    from crsm.release.mamba2 import export_mamba2
    from jobs.checkpoints import load_with_settings
    from jobs.command import write_result

    loaded = load_with_settings(checkpoint, overrides=overrides)
    if layout == "checkpoint":
        save_checkpoint(loaded, folder, DTYPES[dtype])
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    elif layout == "mamba2":
        files = export_mamba2(loaded, folder, dtype=dtype, max_shard_size=max_shard)
    else:
        files = export_checkpoint(
            loaded,
            folder,
            dtype=dtype,
            licence=licence,
            results=records,
            data_report=_data_report(data, loaded.config.stage_1.text),
            run_report=_run_report(resolve_checkpoint(checkpoint) / "report.json", loaded.report),
            max_shard_size=max_shard,
        )
    note(f"{len(files)} files, {sum(files.values()):,} bytes")
    print(folder)
    write_result("export", loaded.config, loaded.config.seed, {"folder": str(folder), "files": files}, json)


def _data_report(path: Path | None, text: Any) -> dict[str, Any] | None:
    """Of the open text: the file that was named, or what lies beside the shards."""
    if path is None and text is not None and (Path(text.shards) / "report.json").is_file():
        path = Path(text.shards) / "report.json"
    if path is None:
        return None
    report = _read(path)
    if not {"name", "sources"} <= set(report):
        raise ValueError(f"{path}: no report of prepared data; allowed: what jobs.prepare_data wrote")
    return report


def _run_report(path: Path, stages: dict[str, Any]) -> dict[str, Any] | None:
    """What the pipeline wrote beside a checkpoint; None if there is nothing, or if it is about another training."""
    if not path.is_file():
        return None
    report = _read(path)
    told = (report.get("results") or {}).get("stages") or {}
    same = told.keys() == stages.keys() and all(
        told[stage].get(key) == stages[stage].get(key) for stage in stages for key in ("steps", "loss", "commit")
    )
    return report if same and stages else None


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = jsonlib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is cut short or not JSON") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; allowed: an object")
    return tree
