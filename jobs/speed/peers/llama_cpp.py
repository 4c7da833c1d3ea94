"""llama.cpp's own benchmark, ``llama-bench``, on GGUF files that ``jobs.speed.build_llama_bench`` makes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jobs.speed.peers.process import PeerError, peer_environment

FILES = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
"""Our names of number formats, and llama.cpp's."""


def gguf_name(shape: str, dtype: str) -> str:
    return f"{shape}-{FILES[dtype]}.gguf"


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """``llama-bench`` on the files of one folder; every call is a process of its own, which loads and warms up."""

    program: Path
    folder: Path
    threads: int

    def decode(self, shape: str, dtype: str, tokens: int) -> float:
        """Seconds of ``tokens`` tokens of one stream.

        Raises:
            PeerError: program or file are missing, or the run failed.
        """
        return tokens / self._run(shape, dtype, "-p", "0", "-n", str(tokens))

    def prefill(self, shape: str, dtype: str, tokens: int) -> float:
        """Seconds of a prompt of ``tokens`` tokens.

        Raises:
            PeerError: as :meth:`decode`.
        """
        return tokens / self._run(shape, dtype, "-p", str(tokens), "-n", "0")

    def check(self, shape: str, dtype: str) -> None:
        """
        Raises:
            PeerError: program or file are missing; the message says what makes them.
        """
        for path in (self.program, self.folder / gguf_name(shape, dtype)):
            if not path.is_file():
                raise PeerError(f"{path} is missing; `make llama-bench` makes it")

    def _run(self, shape: str, dtype: str, *arguments: str) -> float:
        """Tokens a second by its own count: of one repetition, after its own warm-up."""
        self.check(shape, dtype)
        model = self.folder / gguf_name(shape, dtype)
        command = [str(self.program), "-m", str(model), "-t", str(self.threads), "-r", "1", "-o", "json", *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, check=False, env=peer_environment()
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"{self.program}: {error}") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise PeerError(f"{self.program}: {lines[-1] if lines else f'exit status {done.returncode}'}")
        return parse(done.stdout)


def parse(output: str) -> float:
    """Tokens a second from what ``llama-bench -o json`` prints of one test.

    Raises:
        PeerError: it is not that.
    """
    try:
        (test,) = json.loads(output)
        return float(test["avg_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"llama-bench printed something else than one test: {error!r}") from None
