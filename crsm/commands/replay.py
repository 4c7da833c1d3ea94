"""Saying the tokens of an event log again, without a planner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crsm.commands.options import CheckpointOption, JsonOption, note

if TYPE_CHECKING:
    from crsm.model import Checkpoint


def replay(
    file: Annotated[Path, typer.Argument(help="An event log, written with --event-log.")],
    checkpoint: CheckpointOption = "nano",
    json: JsonOption = None,
) -> None:
    """Say the tokens of an event log again, without any planner.

    Exit status 1 if a token differs from the log's.
    """
    from crsm.event_log import read_log
    from crsm.model import load_checkpoint
    from jobs.command import write_result

    generations = read_log(file)
    loaded = load_checkpoint(checkpoint)
    for generation in generations:
        if generation.model_hash != loaded.weights_hash:
            raise ValueError(
                f"{file}: was written with weights {generation.model_hash or '(never saved)'}; checkpoint "
                f"{checkpoint!r} has {loaded.weights_hash}"
            )
    replayed = [_replay(loaded, generation) for generation in generations]
    write_result("replay", loaded.config, loaded.config.seed, {"generations": replayed}, json)
    differing = sum(not entry["identical"] for entry in replayed)
    if differing:
        raise SystemExit(1)


def _replay(checkpoint: Checkpoint, logged: Any) -> dict[str, Any]:
    from crsm.engine import Engine
    from crsm.generation import GenerationRequest

    engine = Engine(checkpoint, injection_source=lambda _, position: logged.injections.get(position))
    engine.submit(GenerationRequest(logged.prompt, logged.sampling, logged.deliberation))
    wanted = [token for token in logged.tokens if token >= 0]  # a cancelled generation ends with a token of -1
    decoder = checkpoint.tokenizer.stream()
    said: list[int] = []
    # A log may end before its generation did.
    while engine.busy and len(said) < len(wanted):
        for token in engine.step():
            said.append(token.token)
            mark = "*" if token.injection is not None else ""
            sys.stdout.write(decoder.push(token.token) + mark)
            sys.stdout.flush()
    print(decoder.flush(), flush=True)
    identical = said == wanted
    if identical:
        note(f"{len(said)} tokens, {len(logged.injections)} plans written: the same as in the log")
    else:
        place = next(
            (i for i, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), min(len(said), len(wanted))
        )
        now, then = (
            repr(checkpoint.tokenizer.token(tokens[place])) if place < len(tokens) else "nothing"
            for tokens in (said, wanted)
        )
        note(f"difference at position {len(logged.prompt) + place}: {now} now, {then} in the log")
    return {
        "generation": logged.generation_id,
        "text": checkpoint.tokenizer.decode(said),
        "tokens": said,
        "injections": len(logged.injections),
        "identical": identical,
    }
