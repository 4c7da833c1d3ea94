"""The command ``crsm``. Parses first: torch and Ray are imported once a command knows what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crsm import __version__

if TYPE_CHECKING:
    from crsm.engine import Engine
    from crsm.model import Checkpoint
    from crsm.planners import Planners
    from crsm.tasks.base import Problem, Task
    from crsm.types import Token

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Continuous Reasoning State Models: a language model that thinks while it speaks.",
)


def main() -> None:
    """The entry point ``crsm``."""
    from jobs.command import run

    run(app)


def _json_target(value: str | None) -> str | None:
    from jobs.command import check_json

    return check_json(value)


def _version(value: bool) -> None:
    if value:
        print(f"crsm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="NAME", help="A checkpoint's folder, or the name of a shipped one.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (YAML) on top of the checkpoint's own.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Changes one setting; repeatable, the last one wins."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, metavar="INTEGER", help="The settings' seed.")]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=_json_target, help="Writes the result; - for standard output."),
]


# ----------------------------------------------------------------------------------------------------------- generate


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; - reads standard input.")] = None,
    problem: Annotated[
        str | None,
        typer.Option("--problem", metavar="TASK[:INDEX]", help="A fresh test problem instead of a prompt."),
    ] = None,
    checkpoint: CheckpointOption = "nano",
    planners: Annotated[
        int | None, typer.Option("--planners", min=0, help="Planners; 0: System 1 alone. The settings' if not given.")
    ] = None,
    actors: Annotated[bool, typer.Option("--actors", help="Planners as Ray actors, not threads.")] = False,
    lag: Annotated[int | None, typer.Option("--lag", min=0, help="Tokens between a request and its target.")] = None,
    rate: Annotated[float | None, typer.Option("--rate", min=0, max=1, help="Injection rate.")] = None,
    channel: Annotated[
        Literal["state", "policy", "both", "off"] | None, typer.Option("--channel", help="How a plan reaches System 1.")
    ] = None,
    clock: Annotated[
        Literal["virtual", "wall"] | None,
        typer.Option("--clock", help="virtual: plans are there at their target; wall: when they arrive."),
    ] = None,
    pace: Annotated[
        float | None, typer.Option("--pace", metavar="TOKENS_PER_SECOND", help="At most; implies the wall clock.")
    ] = None,
    simulations: Annotated[int | None, typer.Option("--simulations", min=1, help="Budget of one plan.")] = None,
    hypotheses: Annotated[int | None, typer.Option("--hypotheses", min=1, help="Futures to plan for.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Tokens to say at most.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="0: greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="0: off.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", max=1, help="1: off.")] = None,
    event_log: Annotated[
        Path | None, typer.Option("--event-log", metavar="FILE", help="Writes every event, for crsm replay.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Shows every plan that was written.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Go on from a prompt, planners at work meanwhile.

    Tokens that were computed right after a plan was written are marked: coloured on a terminal, by * elsewhere. The
    text goes to standard output, all else to standard error.
    """
    from jobs.checkpoints import load_with_settings
    from jobs.command import write_result

    changes = {
        "planners.count": planners,
        "deliberation.lag": lag,
        "deliberation.injection_rate": rate,
        "deliberation.channel": channel,
        "deliberation.hypotheses": hypotheses,
        "search.simulations": simulations,
        "engine.clock": clock or ("wall" if pace is not None else None),
        "engine.pace": pace,
        "sampling.max_tokens": max_tokens,
        "sampling.temperature": temperature,
        "sampling.top_k": top_k,
        "sampling.top_p": top_p,
        "sampling.seed": seed,
    }
    if clock == "virtual" and pace is not None:
        raise ValueError(f"pace = {pace:g} with the virtual clock; allowed: --pace with --clock wall")
    asked = [f"{key}={value}" for key, value in changes.items() if value is not None]
    loaded = load_with_settings(checkpoint, config, [*(overrides or ()), *asked], seed)
    task, question, tokens = _prompt(loaded, prompt, problem)
    results = _generate(loaded, tokens, task, question, actors=actors, event_log=event_log, verbose=verbose)
    write_result("generate", loaded.config, loaded.config.seed, results, json)


def _prompt(
    checkpoint: Checkpoint, prompt: str | None, problem: str | None
) -> tuple[Task | None, Problem | None, tuple[int, ...]]:
    """The prompt's tokens, and the problem that it is, if it is one."""
    if (prompt is None) == (problem is None):
        raise ValueError("either a prompt or --problem; allowed: exactly one of them")
    if problem is not None:
        from crsm.data.sequences import encode_prompt
        from jobs.checkpoints import pick_task

        name, _, index = problem.partition(":")
        if index and not index.isdecimal():
            raise ValueError(f"--problem {problem!r}: {index!r} is no index; allowed: TASK:0, TASK:1, …")
        task = pick_task(checkpoint.config, name)
        question = task.generate(checkpoint.config.seed, "test", int(index or 0))
        return task, question, tuple(encode_prompt(question, checkpoint.tokenizer))
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    if not text.strip():
        raise ValueError("prompt is empty; allowed: at least one word of the vocabulary")
    try:
        return None, None, tuple(checkpoint.tokenizer.encode(text.rstrip("\n")))
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None


def _generate(
    checkpoint: Checkpoint,
    prompt: tuple[int, ...],
    task: Task | None,
    problem: Problem | None,
    *,
    actors: bool,
    event_log: Path | None,
    verbose: bool,
) -> dict[str, Any]:
    import contextlib

    from crsm.engine import Engine
    from crsm.event_log import EventLog
    from crsm.generation import GenerationRequest

    settings = checkpoint.config
    if settings.planners.count == 0:
        _note("zero planners: System 1 alone")
    elif not checkpoint.model.gate.calibrated:
        _note("the gates of this checkpoint are shut: plans are made and none is written")
    if problem is not None:
        _note(f"problem: {problem.prompt}")
    with contextlib.ExitStack() as stack:
        log = EventLog(stack.enter_context(_new_file(event_log))) if event_log else None
        planners = _start_planners(checkpoint, actors, stack)
        engine = Engine(checkpoint, planners, settings.engine, event_log=log)
        request = GenerationRequest(prompt, settings.sampling, settings.deliberation, settings.search.simulations)
        said, seconds = _stream(engine, request, checkpoint, verbose)
    text = checkpoint.tokenizer.decode([token.token for token in said])
    results: dict[str, Any] = {
        "prompt": checkpoint.tokenizer.decode(prompt),
        "text": text,
        "tokens": [token.token for token in said],
        "log_probability": sum(token.logprob for token in said),
        "finish": said[-1].finish_reason,
        "injections": [_injection(token, checkpoint) for token in said if token.injection is not None],
        "tokens_per_second": (len(said) - 1) / seconds if len(said) > 1 else None,
        "plans": engine.metrics.summary(),
    }
    if task is not None and problem is not None:
        results["correct"] = task.verify(problem, text)
        results["solution"] = problem.solution
        _note(f"the answer is {'right' if results['correct'] else f'wrong; right: {problem.solution}'}")
    _note(_metrics_line(results))
    return results


def _new_file(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", encoding="utf-8")


def _start_planners(checkpoint: Checkpoint, actors: bool, stack: Any) -> Planners | None:
    """Planners by the settings, closed with ``stack``; None for none."""
    settings = checkpoint.config.planners
    if settings.count == 0:
        return None
    if actors:
        from jobs.checkpoints import planner_actors

        pool: Planners = stack.enter_context(planner_actors(checkpoint, shed=checkpoint.config.engine.clock == "wall"))
        return pool
    from crsm.planners import ThreadPlanners
    from crsm.reasoning import Deliberator

    # The virtual clock waits for every plan; only by the wall clock is there anything to shed.
    in_flight = settings.max_in_flight if checkpoint.config.engine.clock == "wall" else None
    threads = ThreadPlanners(Deliberator.from_checkpoint(checkpoint), settings.count, settings.max_batch, in_flight)
    stack.callback(threads.close)
    return threads


def _stream(engine: Engine, request: Any, checkpoint: Checkpoint, verbose: bool) -> tuple[list[Token], float]:
    """Says the tokens as they come; returns them and the seconds from the first to the last."""
    import time

    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    decoder = checkpoint.tokenizer.stream()
    said: list[Token] = []
    first = now = 0.0
    for token in engine.generate([request]):
        said.append(token)
        now = time.perf_counter()
        first = first or now
        piece = decoder.push(token.token) + (decoder.flush() if token.finished else "")
        steered = token.injection is not None
        if console.is_terminal:
            console.print(Text(piece, "bold cyan" if steered else ""), end="")
        else:
            sys.stdout.write(f"{piece}*" if steered else piece)
        if verbose:
            # A line per token: what was written goes beside the token that it shaped.
            note = "" if token.injection is None else f"   ← {_describe(token, checkpoint)}"
            console.print(Text(note, "dim"))
        sys.stdout.flush()
    if not verbose:
        print(flush=True)
    return said, now - first


def _injection(token: Token, checkpoint: Checkpoint) -> dict[str, Any]:
    injection = token.injection
    assert injection is not None
    plan, critic = injection.plan, checkpoint.model.critic
    import torch

    with torch.inference_mode():
        root, end = (float(critic.consensus(torch.tensor(v))) for v in (plan.value_root_L, plan.value_plan_L))
    return {
        "position": injection.position,
        "shapes": token.position,
        "target": plan.target,
        "requested_at": plan.position,
        "late": injection.position - plan.target,
        "line": [checkpoint.tokenizer.token(planned) for planned in plan.line],
        "value": {"now": root, "planned": end},
        "gates": [float(gate) for gate in plan.confidence_L],
        "alpha": list(injection.alpha_L),
        "policy_weight": injection.policy_weight,
        "simulations": plan.simulations,
        "seconds": plan.seconds,
        "planner": plan.planner_id,
    }


def _describe(token: Token, checkpoint: Checkpoint) -> str:
    found = _injection(token, checkpoint)
    late = f", {found['late']} late" if found["late"] else ""
    return (
        f"plan “{' '.join(found['line'])}”, asked {found['target'] - found['requested_at']} tokens ahead{late}, "
        f"value {found['value']['now']:.2f} → {found['value']['planned']:.2f}, "
        f"gates {' '.join(f'{gate:.2f}' for gate in found['gates'])}"
    )


def _metrics_line(results: dict[str, Any]) -> str:
    plans = results["plans"]
    speed = results["tokens_per_second"]
    line = f"{len(results['tokens'])} tokens" + ("" if speed is None else f", {speed:,.0f} tokens/s after the first")
    if not plans["requests"]:
        return f"{line}, no plans asked for"
    outcomes = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in plans["outcomes"].items())
    return (
        f"{line}, {plans['requests']} plans asked for: {outcomes}; {plans['injections']} written, "
        f"hit rate {plans['plan_hit_rate']:.2f}"
    )


# ------------------------------------------------------------------------------------------------------------- replay


@app.command()
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
        _note(f"{len(said)} tokens, {len(logged.injections)} plans written: the same as in the log")
    else:
        place = next(
            (i for i, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), min(len(said), len(wanted))
        )
        now, then = (
            repr(checkpoint.tokenizer.token(tokens[place])) if place < len(tokens) else "nothing"
            for tokens in (said, wanted)
        )
        _note(f"difference at position {len(logged.prompt) + place}: {now} now, {then} in the log")
    return {
        "generation": logged.generation_id,
        "text": checkpoint.tokenizer.decode(said),
        "tokens": said,
        "injections": len(logged.injections),
        "identical": identical,
    }


# ------------------------------------------------------------------------------------------------------------ inspect


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or the name of a shipped one.")] = "nano",
    messages: Annotated[
        bool, typer.Option("--messages", help="Only sizes of messages, beside those of public models, as Markdown.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Show what a checkpoint is made of and what is known about it."""
    from crsm.evaluation.inspection import inspect_checkpoint, public_message_sizes
    from crsm.model import load_checkpoint
    from jobs.command import write_result

    loaded = load_checkpoint(checkpoint)
    if messages:
        sizes = public_message_sizes(checkpoint, loaded.config.model)
        _print_messages(sizes)
        write_result("inspect", loaded.config, loaded.config.seed, {"messages": sizes}, json)
        return
    results = inspect_checkpoint(loaded)
    _print_inspection(checkpoint, results)
    write_result("inspect", loaded.config, loaded.config.seed, results, json)


def _print_messages(sizes: dict[str, dict[str, dict[str, int]]]) -> None:
    columns = [f"{what}, {wire}" for what, by_wire in next(iter(sizes.values())).items() for wire in by_wire]
    print(f"| bytes | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    for name, row in sizes.items():
        print(f"| {name} | {' | '.join(f'{size:,}' for by_wire in row.values() for size in by_wire.values())} |")


def _print_inspection(name: str, results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

    def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
        drawn = Table(title=Text(title, "bold"), title_justify="left")
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)

    def row(values: list[float]) -> list[str]:
        return [f"{value:.3f}" for value in values]

    table(
        f"{name}: parts",
        ["part", "parameters", "bytes"],
        [[part, f"{size['parameters']:,}", f"{size['bytes']:,}"] for part, size in results["parts"].items()],
    )
    table("sizes in bytes", ["what", "bytes"], [[what, f"{size:,}"] for what, size in results["bytes"].items()])
    layers = [str(layer) for layer in range(len(results["layers"]["fusion"]))]
    table(
        "per layer",
        ["", *(f"layer {layer}" for layer in layers)],
        [[what.replace("_", " "), *row(values)] for what, values in results["layers"].items()],
    )
    for task, steps in results["fidelity"].items():
        table(
            f"world model on {task}, by imagined steps",
            ["steps", "policy KL (nats)", "value error", "cosine", "branch accuracy"],
            [
                [
                    str(int(step["step"])),
                    *(
                        "–" if step[key] is None else f"{step[key]:.3f}"
                        for key in ("policy_kl", "value_error", "cosine", "branch_accuracy")
                    ),
                ]
                for step in steps
            ],
        )
    facts = [[what, str(value)] for what, value in results["facts"].items()]
    table("known about it", ["what", "value"], facts)


# --------------------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    checkpoint: CheckpointOption = "nano",
    problems: Annotated[int, typer.Option("--problems", min=1, help="Fresh test problems of each task.")] = 200,
    pace: Annotated[float, typer.Option("--pace", min=0.1, help="Tokens per second by the wall clock.")] = 10.0,
    actors: Annotated[
        bool, typer.Option("--actors/--threads", help="The planner as a Ray actor, or as a thread of this process.")
    ] = True,
    figure: Annotated[
        Path, typer.Option("--figure", metavar="FILE", help="Where the picture goes (PNG, SVG, PDF).")
    ] = Path("runs/demo/demo.png"),
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """System 1 and System 2 side by side on fresh problems: a table and a picture.

    Accuracy by the virtual clock, which no machine's speed can change; then some answers by the wall clock, where
    planners must not delay a token. Exit status 1 if they did, or if no plan was written.
    """
    from crsm.evaluation.demo import check_demo, run_demo
    from jobs.checkpoints import limit_threads, load_with_settings
    from jobs.command import write_result
    from jobs.demo import demo_planners

    loaded = load_with_settings(checkpoint, config, overrides, seed)
    check_demo(loaded, figure)
    limit_threads()
    with demo_planners(loaded, actors) as (planners, kind):
        results, status = run_demo(loaded, planners, problems, pace, figure)
    write_result("demo", loaded.config, loaded.config.seed, {"planners": kind, **results}, json)
    if status:
        raise SystemExit(status)


# -------------------------------------------------------------------------------------------------------------- serve


@app.command()
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


# ------------------------------------------------------------------------------------------------------------- doctor


@app.command()
def doctor(
    config: ConfigOption = None,
    overrides: SetOption = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="A cluster's head; RAY_ADDRESS if not given."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """What this machine and its cluster have, what is missing, and the command that mends it.

    Exit status 1 if something is missing that the settings ask for.
    """
    from jobs.command import load_settings, write_result
    from jobs.doctor import State, diagnose, look, show

    settings = load_settings(config, overrides)
    findings = diagnose(look(settings, address))
    show(findings)
    write_result("doctor", settings, settings.seed, {"findings": findings}, json)
    if any(finding.state is State.MISSING for finding in findings):
        raise SystemExit(1)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
