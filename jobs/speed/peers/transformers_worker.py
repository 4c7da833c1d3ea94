"""transformers in a process of its own, with PyTorch's default settings: ours leaves the cores to the native core.

    python transformers_worker.py THREADS

Questions and answers are lines of JSON, see ``process.py``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch  # first: importing ours changes what it reads from the environment


class Worker:
    """One model, and what is to be timed of it."""

    def __init__(self, shape: dict[str, Any], seed: int) -> None:
        from jobs.speed.peers import transformers
        from jobs.speed.shapes import Shape

        self._peer = transformers
        self._model = transformers.build(Shape(**shape), seed)
        self._run: Any = None

    def train(self, tokens: list[list[int]]) -> dict[str, Any]:
        """Prepares training steps on these tokens, with the chunk length that is the fastest."""
        from jobs.speed.train_speed import training_step

        tokens_BT = torch.tensor(tokens)
        self._model.train()
        self._run = training_step(list(self._model.parameters()), lambda: self._peer.loss(self._model, tokens_BT))
        return self._fastest()

    def prefill(self, tokens: list[list[int]]) -> dict[str, Any]:
        """Prepares the consumption of these prompts, with the chunk length that is the fastest."""
        decoder, tokens_BT = self._peer.Decoder(self._model), torch.tensor(tokens)
        self._run = lambda: decoder.prefill(tokens_BT)
        return self._fastest()

    def decode(self, tokens: list[list[int]], steps: int) -> dict[str, Any]:
        """Prepares ``steps`` tokens after these prompts."""
        decoder = self._peer.Decoder(self._model)
        token_B, cache = decoder.prefill(torch.tensor(tokens))
        self._run = lambda: decoder.decode(token_B, cache, steps)
        return {}

    def run(self) -> dict[str, float]:
        started = time.perf_counter()
        self._run()
        return {"seconds": time.perf_counter() - started}

    def _fastest(self) -> dict[str, Any]:
        chunk, seconds = self._peer.use_fastest_chunk(self._model, self._run)
        return {"chunk": chunk, "default": seconds[self._peer.DEFAULT_CHUNK]}


def answers(threads: int) -> None:
    """Answers questions until there are none."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    worker: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        do = question.pop("do")
        answer: dict[str, Any] = {}
        try:
            if do == "load":
                worker = Worker(**question)
            else:
                answer = getattr(worker, do)(**question)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    answers(int(sys.argv[1]))
