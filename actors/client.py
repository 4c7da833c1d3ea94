"""What a caller does with a generator's stream: tokens one by one, and a resumption when the generator dies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from crsm.saved_generation import SavedGeneration
from crsm.types import Token

RESUME_TIMEOUT = 60.0
"""Seconds to wait for a generator that is being restarted."""


class GeneratorDied(RuntimeError):
    """The generator of a stream is gone; the message names the generation."""


def stream_tokens(
    generator: Any,
    prompt: Sequence[int] = (),
    *,
    resume: bool = False,
    snapshot_every: int = 32,
    timeout: float = RESUME_TIMEOUT,
    generation_id: str = "",
    forced: Sequence[int] = (),
    start: str | SavedGeneration | None = None,
    **settings: Any,
) -> Iterator[Token]:
    """The tokens of one generation, one by one.

    With ``resume``, a generator that dies and is restarted (``start_generator(…, max_restarts=…)``) goes on from the
    last snapshot: what was said since is said again, silently, and the stream continues with the token after it. The
    tokens are those of an undisturbed run under the virtual clock; under the wall clock plans come when they come.

    Args:
        generator: the actor.
        prompt: tokens to say on from.
        resume: survive the generator's death.
        snapshot_every: tokens between two snapshots, which travel to the caller with the stream; with ``resume`` only.
        timeout: seconds to wait for a restarted generator.
        generation_id: empty: a fresh one.
        forced: the first tokens to say.
        start: a saved state or its handle.
        **settings: the other arguments of :meth:`~actors.generator.GeneratorActor.generate`.

    Raises:
        GeneratorDied: the generator died and ``resume`` is off, or it did not come back; the message names the
            generation.
        ValueError, QueueFull, GenerationFailed: as :meth:`~actors.generator.GeneratorActor.generate`.
    """
    name = generation_id or uuid.uuid4().hex
    said: list[Token] = []
    saved: SavedGeneration | None = None
    again = 0
    while True:
        arguments: dict[str, Any] = {"start": saved} if saved else {"prompt": tuple(prompt), "start": start}
        repeated = [token.token for token in said if saved is None or token.position > saved.position]
        stream = generator.generate.remote(
            **arguments,
            **settings,
            forced=(*repeated, *forced[len(said) :]),
            generation_id=name if not again else f"{name}-{again}",
            snapshot_every=snapshot_every if resume else 0,
        )
        heard = said[-1].position if said else -1
        try:
            for reference in stream:
                item = ray.get(reference)
                if isinstance(item, SavedGeneration):
                    saved = item
                    continue
                for token in item:
                    if token.position > heard:
                        said.append(token)
                        yield token._replace(generation_id=name)
                        if token.finished:
                            return
            return
        except RayActorError as error:
            if not resume:
                raise GeneratorDied(f"generation {name}: the generator died after {len(said)} tokens") from error
            again += 1
            wait_until_back(generator, timeout, name)


def wait_until_back(generator: Any, timeout: float, name: str) -> None:
    """Waits for a restarted actor to answer.

    Raises:
        GeneratorDied: it did not within ``timeout`` seconds; ``name`` is the generation that waits for it.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            ray.get(generator.ping.remote(), timeout=max(0.1, until - time.monotonic()))
            return
        except (RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() > until or isinstance(error, ray.exceptions.ActorDiedError):
                raise GeneratorDied(f"generation {name}: the generator died and did not come back") from error
            time.sleep(0.1)
