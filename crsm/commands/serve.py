"""The Serve application on a local Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crsm.commands.options import CheckpointOption, ConfigOption, SeedOption, SetOption


def serve(
    checkpoint: CheckpointOption = "nano",
    host: Annotated[str, typer.Option("--host", help="Address; beyond 127.0.0.1 only with API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model.")] = None,
    planners: Annotated[
        int | None, typer.Option("--planners", min=0, help="Of each replica; the settings' if not given.")
    ] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Each with a generator of its own.")] = 1,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="A key a line; also CRSM_API_KEYS.")
    ] = None,
    drain: Annotated[float, typer.Option("--drain", min=0.1, help="Seconds for streams to end after Ctrl-C.")] = 30.0,
    tracing: Annotated[bool, typer.Option("--tracing", help="OpenTelemetry spans of requests.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """Serve a checkpoint in the form of OpenAI's API, with the live page, on a local Ray.

    --set also takes the limits of the server: --set server.max_tokens=512.
    """
    from actors.serve_command import args_of_options, serve_until_stopped

    args = args_of_options(
        checkpoint,
        name=name,
        planners=planners,
        replicas=replicas,
        api_key_file=api_key_file,
        drain=drain,
        config=config,
        overrides=[*(overrides or ()), *([] if seed is None else [f"seed={seed}", f"sampling.seed={seed}"])],
    )
    serve_until_stopped(args, host, port, tracing=tracing)
