"""Going on from a prompt, planners at work meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crsm.commands.options import CheckpointOption, ConfigOption, JsonOption, SeedOption, SetOption, note

if TYPE_CHECKING:
    from crsm.engine import Engine
    from crsm.model import Checkpoint
    from crsm.planners import Planners
    from crsm.tasks.base import Problem, Task
    from crsm.types import Token


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
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option(
            "--device", help="Where both systems compute; auto: a GPU if there is one. The settings' if none."
        ),
    ] = None,
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
        "planners.device": device,
        "engine.device": device,
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
    from crsm.placement import settled

    settings = checkpoint.config
    if settings.planners.count == 0:
        note("zero planners: System 1 alone")
    elif not checkpoint.model.gate.calibrated:
        note("the gates of this checkpoint are shut: plans are made and none is written")
    if problem is not None:
        note(f"problem: {problem.prompt}")
    with contextlib.ExitStack() as stack:
        log = EventLog(stack.enter_context(_new_file(event_log))) if event_log else None
        speaker = settled(checkpoint, settings.engine.device, "engine.device")
        planners = _start_planners(checkpoint, speaker, actors, stack)
        engine = Engine(speaker, planners, settings.engine, event_log=log)
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
        note(f"the answer is {'right' if results['correct'] else f'wrong; right: {problem.solution}'}")
    note(_metrics_line(results))
    return results


def _new_file(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", encoding="utf-8")


def _start_planners(checkpoint: Checkpoint, speaker: Checkpoint, actors: bool, stack: Any) -> Planners | None:
    """Planners by the settings, closed with ``stack``; None for none. Threads share the weights of the ``speaker`` if
    they are to compute where it does."""
    settings = checkpoint.config.planners
    if settings.count == 0:
        return None
    if actors:
        from jobs.checkpoints import planner_actors

        pool: Planners = stack.enter_context(planner_actors(checkpoint, shed=checkpoint.config.engine.clock == "wall"))
        return pool
    from crsm.planners import ThreadPlanners
    from crsm.reasoning import Deliberator

    thinker = speaker if settings.device == checkpoint.config.engine.device else checkpoint
    # The virtual clock waits for every plan; only by the wall clock is there anything to shed.
    in_flight = settings.max_in_flight if checkpoint.config.engine.clock == "wall" else None
    threads = ThreadPlanners(Deliberator.from_checkpoint(thinker), settings.count, settings.max_batch, in_flight)
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
