"""What a backend does with the messages of a generator: one generation's items until its last token. No Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence

from actors.decode_loop import Closed, Refused
from actors.serving.backend import GenerationFailed, Item
from actors.streams import Stream
from crsm.engine import QueueFull
from crsm.types import Token


async def receive(
    generation_id: str, stream: Stream, cancel: Callable[[str], None]
) -> AsyncGenerator[Sequence[Item], None]:
    """The items of one generation, in bundles, as they come.

    Args:
        generation_id: which.
        stream: where its messages are put.
        cancel: ends the generation; called if whoever reads leaves before the last token.

    Raises:
        ValueError: it was refused; nothing was said.
        QueueFull: it was refused since too many wait.
        GenerationFailed: the generator has closed, failed or died.
    """
    over = False
    try:
        while not over:
            items: list[Item] = []
            for message in await stream.take():
                if isinstance(message, Token):
                    over = message.finished
                elif isinstance(message, Refused):
                    over = True
                    raise QueueFull(message.reason) if message.full else ValueError(message.reason)
                elif isinstance(message, Closed):
                    over = True
                    raise GenerationFailed(f"generation {generation_id}: {message.reason}")
                items.append(message)
            yield items
    finally:
        if not over:
            cancel(generation_id)
