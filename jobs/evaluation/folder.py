"""A benchmark's folder: every answer of every system, whole parts of them at a time.

    settings.json      what the answers were made with, and the digest of the problems
    problems.jsonl     the problems as they were asked
    parts.jsonl        a line for every part that was answered, in whatever order
    answers.jsonl      once all parts are there: a line per answer, by system, problem and sample

A line that a crash cut short is not a part: it is answered again, with the same answers. Answers made with other
settings, weights or problems are refused, not mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crsm.evaluation.benchmarks.base import Benchmark, PartResult, Record
from crsm.evaluation.benchmarks.examiner import Part
from jobs.command import write_atomically

SETTINGS, PROBLEMS, PARTS, ANSWERS = "settings.json", "problems.jsonl", "parts.jsonl", "answers.jsonl"


class AnswerFolder:
    """What is known of one benchmark's answers."""

    def __init__(self, folder: Path, benchmark: Benchmark, made_with: Mapping[str, Any]) -> None:
        """Opens the folder, or makes it.

        Raises:
            ValueError: it holds answers that were made with something else, which is named.
            OSError: it cannot be written.
        """
        from crsm.training.loop import check_fingerprint

        self.folder, self.benchmark = folder, benchmark
        asked = json.loads(json.dumps({**made_with, "problems": benchmark.digest, "number": len(benchmark)}))
        saved = folder / SETTINGS
        if saved.is_file():
            try:
                check_fingerprint(json.loads(saved.read_text(encoding="utf-8")), asked, str(folder))
            except ValueError as error:
                raise ValueError(f"{error}; allowed: the same, another --output, or --fresh") from error
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} holds something else; allowed: a new or empty folder, or a benchmark's")
        else:
            write_atomically(folder / PROBLEMS, _lines(benchmark.problems()))
            write_atomically(saved, json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
        self._results = self._read()

    def missing(self, systems: Sequence[str], size: int) -> list[Part]:
        """The parts that have not been answered, in order."""
        every = [
            Part(self.benchmark.name, system, first, size)
            for system in systems
            for first in range(0, len(self.benchmark), size)
        ]
        return [part for part in every if part not in self._results]

    def add(self, part: Part, result: PartResult) -> None:
        """Keeps a part's answers; they are on the disk when this returns."""
        with open(self.folder / PARTS, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was cut short
                    file.write(b"\n")
            line = json.dumps({"part": asdict(part), "result": asdict(result)}, ensure_ascii=False)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._results[part] = result

    def records(self, system: str) -> list[Record]:
        """A system's answers, in order."""
        return [record for part in self._parts_of(system) for record in self._results[part].records]

    def plans(self, system: str) -> dict[str, int]:
        """What became of a system's plans."""
        counts: dict[str, int] = {}
        for part in self._parts_of(system):
            for name, value in self._results[part].plans.items():
                counts[name] = counts.get(name, 0) + value
        return counts

    def seconds(self, system: str) -> float:
        return sum(self._results[part].seconds for part in self._parts_of(system))

    def conclude(self, systems: Sequence[str]) -> None:
        """Writes ``answers.jsonl``."""
        lines = ({"system": system, **record} for system in systems for record in self.records(system))
        write_atomically(self.folder / ANSWERS, _lines(lines))

    def _parts_of(self, system: str) -> list[Part]:
        return sorted((part for part in self._results if part.system == system), key=lambda part: part.first)

    def _read(self) -> dict[Part, PartResult]:
        found: dict[Part, PartResult] = {}
        path = self.folder / PARTS
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    tree = json.loads(line)
                    found.setdefault(Part(**tree["part"]), PartResult(**tree["result"]))
        return found


def _lines(records: Iterable[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
