"""System 2 for the model class of an exported repository: all that its remote code asks of this package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint, load_checkpoint, use_settings
from crsm.overrides import merge_settings
from crsm.planners import ThreadPlanners
from crsm.reasoning import Deliberator


class System2:
    """Generation with planners in threads, by a checkpoint's own settings."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._own = checkpoint.config

    @classmethod
    def load(cls, name: str) -> System2:
        """From an exported folder, or from a repository of the hub, which is then in the cache or downloaded.

        Raises:
            ValueError: the folder is no exported checkpoint, or not a whole one.
        """
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name))
        return cls(load_checkpoint(folder))

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Iterable[str] = (), seed: int | None = None
    ) -> list[list[int]]:
        """The answers to some prompts, in tokens; answer ``i`` is drawn with seed ``sampling.seed + i``.

        Args:
            prompts: tokens.
            settings: ``section.key=value`` on top of the checkpoint's own.
            seed: of the settings.

        Raises:
            ValueError: a setting that is not allowed, or an empty prompt.
        """
        config = merge_settings(self._own, None, settings, seed)
        use_settings(self.checkpoint, config)
        requests = [
            GenerationRequest(
                tuple(prompt),
                config.sampling.model_copy(update={"seed": config.sampling.seed + index}),
                config.deliberation,
                config.search.simulations,
                generation_id=f"answer-{index}",
            )
            for index, prompt in enumerate(prompts)
        ]
        if config.planners.count == 0:
            return Engine(self.checkpoint, None, config.engine).generate_all(requests)
        in_flight = config.planners.max_in_flight if config.engine.clock == "wall" else None
        planners = ThreadPlanners(
            Deliberator.from_checkpoint(self.checkpoint), config.planners.count, config.planners.max_batch, in_flight
        )
        try:
            return Engine(self.checkpoint, planners, config.engine).generate_all(requests)
        finally:
            planners.close()
