"""Scorers in child processes: whatever an answer tries, its process ends, it scores 0, and the next one is scored."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from crsm.tasks.sandbox import MAX_PAYLOAD, Sandbox, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are the Linux kernel's")


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory):
    """A scorer that runs its answers."""
    folder = tmp_path_factory.mktemp("scorer")
    (folder / "careless_scorer.py").write_text("def score(payload):\n    return eval(payload['answer'])\n")
    sys.path.insert(0, str(folder))
    sandbox = Sandbox("careless_scorer:score", seconds=0.5, memory_mb=128)
    yield sandbox
    sandbox.close()
    sys.path.remove(str(folder))


def test_a_score_comes_back(careless: Sandbox) -> None:
    assert careless.score({"answer": "0.5"}) == Verdict(0.5)
    assert pickle.loads(pickle.dumps(careless)).score({"answer": "1"}) == Verdict(1.0)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("9**9**9**9", "not scored within 0.5 s"),
        ("all(zero == 0 for zero in iter(int, 1))", "not scored within 0.5 s"),
        ("len(bytearray(10**10))", "MemoryError"),
        ("[b'x' * 10**8 for _ in range(99)]", "MemoryError"),
        ("__import__('socket').socket()", "PermissionError"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("__import__('subprocess').run(['true'])", "PermissionError"),
        ("__import__('os').fork()", "PermissionError"),
        ("__import__('os').kill(__import__('os').getppid(), 9)", "PermissionError"),
        ("__import__('os').execv('/bin/true', ['true'])", "PermissionError"),
        ("__import__('os')._exit(0)", "its process ended without a score"),
        ("__import__('ctypes').string_at(0)", "its process ended without a score"),
        ("float('nan')", "the score is no number"),
        ("print('1.0')", "TypeError"),
        ("1/0", "ZeroDivisionError"),
        ("1 +", "SyntaxError"),
    ],
)
def test_a_hostile_answer_costs_its_own_process_only(careless: Sandbox, answer: str, error: str) -> None:
    assert careless.score({"answer": answer}) == Verdict(0.0, error)
    assert careless.score({"answer": "1"}) == Verdict(1.0)


def test_no_command_runs_and_no_file_is_written_or_removed(careless: Sandbox, tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("kept")
    careless.score({"answer": f"__import__('os').system('touch {new}; rm {kept}')"})
    for attempt in (f"open({str(new)!r}, 'w')", f"__import__('os').unlink({str(kept)!r})", f"open({str(kept)!r}, 'a')"):
        assert careless.score({"answer": attempt}) == Verdict(0.0, "PermissionError")
    assert kept.read_text() == "kept" and not new.exists()


def test_one_answer_cannot_change_how_the_next_is_scored(careless: Sandbox) -> None:
    cheat = "setattr(__import__('careless_scorer'), 'score', lambda payload: 1.0) or 0.25"
    assert careless.score({"answer": cheat}) == Verdict(0.25)
    assert careless.score({"answer": "0"}) == Verdict(0.0)


def test_an_answer_that_is_too_long_is_not_scored(careless: Sandbox) -> None:
    assert careless.score({"answer": "1" * MAX_PAYLOAD}).score == 0.0


def test_a_nursery_that_died_is_replaced(careless: Sandbox) -> None:
    careless.score({"answer": "1"})
    assert careless._process is not None
    os.kill(careless._process.pid, 9)
    careless._process.wait()
    assert careless.score({"answer": "1"}) == Verdict(1.0)


def test_a_scorer_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ValueError, match=r"scorer 'no_such_module:score' cannot be run: ModuleNotFoundError"):
        Sandbox("no_such_module:score", 1.0, 64).score({})


def test_no_secret_of_the_environment_reaches_a_scorer(careless: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hidden")
    careless.close()
    assert careless.score({"answer": "'SECRET_KEY' in __import__('os').environ"}) == Verdict(0.0)
