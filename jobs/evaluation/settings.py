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

from crsm.config import Settings, apply_override, parse_config, parse_settings, read_tree
from crsm.evaluation.benchmarks.settings import EvaluationConfig

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
    source = "defaults" if path is None else str(path)
    stated = {} if path is None else read_tree(path)
    section = stated.pop(SECTION, {})
    if not isinstance(section, dict):
        raise ValueError(f"{source}: {SECTION} = {section!r}; allowed: a mapping")
    parse_config(stated, source)
    evaluation = _parse(section, source)
    own: list[str] = []
    others: list[str] = []
    for override in overrides:
        (own if override.startswith(f"{SECTION}.") else others).append(override)
    if own:
        tree = {SECTION: evaluation.model_dump(mode="json")}
        for override in own:
            apply_override(tree, override)
        evaluation = _parse(tree[SECTION], f"--set {' '.join(own)}")
    return EvaluationFile(evaluation, stated, tuple(others))


def _parse(section: dict[str, Any], source: str) -> EvaluationConfig:
    """Faults are named by their whole path, ``evaluation.part``."""
    return parse_settings(_File, {SECTION: section}, source).evaluation


class _File(Settings):
    evaluation: EvaluationConfig = EvaluationConfig()
