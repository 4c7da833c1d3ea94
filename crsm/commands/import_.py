"""Public weights as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crsm.commands.options import JsonOption, note


def import_(
    source: Annotated[
        str,
        typer.Argument(help="A folder of config.json and weights, or a model of the hub (state-spaces/mamba2-130m)."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes; must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="PATH",
            help="A tokenizer.json, a folder that has one, or a model of the hub; default: the source's.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit on the hub.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="INTEGER", help="Of System 2's untrained parts.")] = 0,
    json: JsonOption = None,
) -> None:
    """Make a checkpoint of public Mamba-2 weights.

    Reads the formats of mamba-ssm and of Hugging Face's Mamba2ForCausalLM. The result says what its source says;
    System 2 changes nothing until the training stages have run.
    """
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"DIR = {str(folder)!r} exists; allowed: a path where nothing is")
    from crsm.importing import import_checkpoint, locate_source, locate_tokenizer
    from crsm.model import save_checkpoint
    from jobs.command import write_result

    found = locate_source(source, revision)
    checkpoint = import_checkpoint(
        found,
        locate_tokenizer(tokenizer, source, found),
        name=folder.resolve().name,
        source=found.resolve().name if Path(source).is_dir() else f"{source}@{found.name[:12]}",  # the commit
        seed=seed,
    )
    save_checkpoint(checkpoint, folder)
    sizes, vocabulary = checkpoint.config.model.backbone, checkpoint.tokenizer
    parameters = checkpoint.model.num_parameters()
    results: dict[str, Any] = {
        **checkpoint.report["import"],
        "checkpoint": str(folder),
        "parameters": parameters,
        "rows": sizes.vocab_size,
        "tokens": vocabulary.vocab_size,
        "trainable": vocabulary.has_verdicts,
    }
    note(
        f"{results['source']}: {results['tensors']} tensors in the layout of {results['layout']}, "
        f"{parameters['backbone'] + parameters['lm_head']:,} parameters -> {folder}"
    )
    if not vocabulary.has_verdicts:
        note(
            f"the embedding has {sizes.vocab_size} rows for {vocabulary.vocab_size} tokens, and none for padding and "
            "verdicts: this checkpoint can be asked and measured, not trained"
        )
    write_result("import", checkpoint.config, seed, results, json)
