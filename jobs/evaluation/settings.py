"""Settings of an evaluation: a section ``evaluation`` beside changes of the checkpoint's settings, in its own file.

    evaluation:
      benchmarks:
        - {name: gsm8k, task: {name: gsm8k, path: test.jsonl}, split: all, max_tokens: 256}
    deliberation: {lag: 1}

``--set evaluation.benchmarks.gsm8k.max_tokens=160`` changes the section, any other ``--set`` the checkpoint's settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crsm.evaluation.benchmarks.settings import EvaluationConfig
from jobs.own_section import load_own_section

SECTION = "evaluation"


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """What was asked for."""

    evaluation: EvaluationConfig
    stated: dict[str, Any] = field(default_factory=dict)
    """Settings that replace the checkpoint's."""
    overrides: tuple[str, ...] = ()
    """``section.key=value`` on top of both."""


def load_evaluation(path: str | Path | None = None, overrides: Iterable[str] = ()) -> EvaluationFile:
    """The evaluation that a file and ``--set`` describe.

    Raises:
        ValueError: naming the file or override, the key, the value and what is allowed.
    """
    return EvaluationFile(*load_own_section(EvaluationConfig, SECTION, path, overrides))
