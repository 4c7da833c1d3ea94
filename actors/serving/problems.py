"""Fresh problems of the model's tasks, and whether an answer to one is right."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.serving.errors import ApiError, invalid
from actors.serving.front import Front
from crsm.tasks import Problem, Task, build_task

DRAWN = ("edges", "start", "goal", "path", "routes")
"""Of a problem's data, what a graph is drawn from."""


class Problems:
    """The tasks of the served model, built when they are first asked for."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._tasks: dict[str, Task] = {}

    async def problem(self, task: str, index: int) -> dict[str, Any]:
        """One test problem.

        Raises:
            ApiError: 404, there is no such task.
        """
        built, found = await self._find(task, index)
        return {
            "task": task,
            "index": index,
            "prompt": found.prompt,
            "solution": found.solution,
            "preamble": built.preamble,
            "data": {name: found.data[name] for name in DRAWN if name in found.data},
        }

    async def check(self, task: str, index: int, text: str) -> dict[str, Any]:
        """Whether a text is the answer.

        Raises:
            ApiError: 404, there is no such task.
        """
        built, found = await self._find(task, index)
        return {"correct": built.verify(found, text), "solution": found.solution}

    async def _find(self, name: str, index: int) -> tuple[Task, Problem]:
        config = self._front.served.config
        settings = {each.label: each for each in config.tasks}
        if name not in settings:
            raise ApiError(
                404,
                f"task = {name[:80]!r} does not exist; allowed: {', '.join(settings)}",
                param="task",
                code="task_not_found",
            )
        try:
            if name not in self._tasks:
                self._tasks[name] = await asyncio.to_thread(build_task, settings[name])
            task = self._tasks[name]
            return task, await asyncio.to_thread(task.generate, config.seed, "test", index)
        except ValueError as error:
            raise invalid(str(error), "task") from None
