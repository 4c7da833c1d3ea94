"""ARC-AGI grids: reading, augmentation, splits, judging, broken files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import ArcAgiConfig, TokenizerConfig
from crsm.data.tokenizer import build_tokenizer
from crsm.tasks import build_task, problems, split_of
from crsm.tasks.arc_agi import SAMPLE_PATH

SAMPLE = build_task(ArcAgiConfig())
PLAIN = build_task(ArcAgiConfig(augment=False))
SPLITS = ("train", "valid", "test")
RULE = {
    "id": "flip",
    "train": [{"input": [[1, 0], [0, 0]], "output": [[0, 1], [0, 0]]}, {"input": [[2, 3]], "output": [[3, 2]]}],
    "test": [{"input": [[0, 4]], "output": [[4, 0]]}, {"input": [[5], [0]], "output": [[5], [0]]}],
}


def _grid(text: str) -> list[list[int]]:
    return [[int(word) for word in row.split()] for row in text.split("|")]


def test_the_sample_ships_32_tasks_with_their_licence() -> None:
    assert len(SAMPLE_PATH.read_text().splitlines()) == 32 == sum(SAMPLE.size(split) or 0 for split in SPLITS)
    assert "Apache License" in SAMPLE_PATH.with_suffix(".LICENSE").read_text()
    for split in SPLITS:
        for problem in problems(SAMPLE, 0, split, 100):
            assert problem.split == split == split_of(problem.key) and SAMPLE.verify(problem, problem.solution)


def test_the_text_is_the_pairs_and_the_grid_that_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(RULE))
    task = build_task(ArcAgiConfig(path=str(path), augment=False))
    (split,) = [split for split in SPLITS if task.size(split)]
    first, second = task.generate(0, split, 0), task.generate(0, split, 1)
    assert first.prompt == "arc_agi 1 0 | 0 0 > 0 1 | 0 0 / 2 3 > 3 2 / 0 4 =" and first.solution == "4 0"
    assert second.prompt.endswith("/ 5 | 0 =") and second.solution == "5 | 0" and second.key == first.key
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "flip.json").write_text(json.dumps({k: v for k, v in RULE.items() if k != "id"}))
    again = build_task(ArcAgiConfig(path=str(folder), augment=False)).generate(0, split, 0)
    assert again == first and again.data["id"] == "flip"


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 10_000))
def test_augmentation_keeps_the_rule(index: int) -> None:
    problem = SAMPLE.generate(5, "train", index)
    known = next(p for p in problems(PLAIN, 5, "train", 100) if p.key == problem.key)

    def cells(pairs: list[list[list[list[int]]]]) -> list[tuple[int, int, list[int]]]:
        """What no turn and no change of colours touches: sizes, and how often colours occur."""
        grids = [np.array(grid) for pair in pairs for grid in pair]
        return sorted(
            (g.size, int((g == 0).sum()), sorted(np.bincount(g.ravel(), minlength=10).tolist())) for g in grids
        )

    shown = [*problem.data["pairs"], [problem.data["input"], problem.data["output"]]]
    source = json.loads(next(line for line in SAMPLE_PATH.read_text().splitlines() if known.data["id"] in line))
    pairs = [[pair["input"], pair["output"]] for pair in source["train"]]
    assert any(cells(shown) == cells([*pairs, [t["input"], t["output"]]]) for t in source["test"])
    assert problem == SAMPLE.generate(5, "train", index)
    texts = problem.prompt.removeprefix("arc_agi ").removesuffix(" =").split(" / ")
    assert [[_grid(t) for t in text.split(" > ")] for text in texts[:-1]] == problem.data["pairs"]
    assert _grid(texts[-1]) == problem.data["input"] and _grid(problem.solution) == problem.data["output"]


def test_images_of_a_task_are_one_task(tmp_path: Path) -> None:
    colours = np.array([0, 7, 1, 9, 3, 2, 4, 5, 6, 8])

    def image(grid: list[list[int]], turn: int) -> list[list[int]]:
        array = colours[np.array(grid)]
        return np.rot90(array.T if turn >= 4 else array, turn % 4).tolist()

    lines = [json.dumps(RULE)]
    for turn in range(8):
        parts = {
            part: [{side: image(pair[side], turn) for side in ("input", "output")} for pair in RULE[part]]
            for part in ("train", "test")
        }
        lines.append(json.dumps({"id": str(turn), "train": parts["train"][::-1], "test": parts["test"]}))
    path = tmp_path / "images.jsonl"
    path.write_text("\n".join(lines))
    task = build_task(ArcAgiConfig(path=str(path)))
    assert sum(task.size(split) or 0 for split in SPLITS) == 1


def test_attempts_and_corrupted_grids_are_judged_by_the_grid() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(), [SAMPLE])
    drawn = []
    for index in range(40):
        problem = SAMPLE.generate(0, "train", index)
        drawn += (attempts := SAMPLE.attempts(problem, np.random.default_rng(index), 10))
        for attempt in attempts:
            assert (
                SAMPLE.verify(problem, attempt.text)
                == attempt.correct
                == (_grid(attempt.text) == problem.data["output"])
            )
            tokenizer.encode(attempt.text)
        words = problem.solution.split()
        for place in range(len(words)):
            changed = [*words[:place], "0" if words[place] != "0" else "1", *words[place + 1 :]]
            assert not SAMPLE.verify(problem, " ".join(changed))
        assert SAMPLE.verify(problem, f"{problem.solution} yes") and not SAMPLE.verify(problem, f"{problem.solution} |")
        for garbage in ("", "|", "0 " * 10_000, "9**9", "\0"):
            assert not SAMPLE.verify(problem, garbage)
    assert 0.4 < np.mean([attempt.correct for attempt in drawn]) < 0.7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 holds a list; allowed: an object"),
        (RULE | {"train": []}, r"line 1: train = \[\]; allowed: a list of at least one pair"),
        (RULE | {"test": [1]}, "line 1: test holds a int; allowed: input and output"),
        (RULE | {"test": [{"input": [[10]], "output": [[1]]}]}, r"line 1: a grid \[\[10\]\]; allowed"),
        (RULE | {"test": [{"input": [[1], [1, 2]], "output": [[1]]}]}, "equal rows"),
        ("", "holds no tasks"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(ValueError, match=message):
        build_task(ArcAgiConfig(path=str(path)))
    with pytest.raises(ValueError, match=r"nowhere' cannot be read"):
        build_task(ArcAgiConfig(path=str(tmp_path / "nowhere")))
