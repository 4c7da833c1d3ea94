"""The command line that all jobs share: quick help, one-line errors, a result file that is whole or absent."""

import contextlib
import enum
import io
import json
import os
import pty
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

import crsm
from crsm.config import Config
from jobs import command
from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption

ROOT = Path(command.__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")

JOB = """
import os, sys
from pathlib import Path
from jobs.command import *

def main(
    config: ConfigOption = None, overrides: SetOption = None, seed: SeedOption = None, json: JsonOption = None,
    fail: str = "", status: int = 0,
) -> int:
    \"\"\"A job for a test.\"\"\"
    settings = load_settings(config, overrides, seed)
    print("noise from Python")
    os.system("echo noise from a child")
    with Progress("work", 3) as progress:
        for done in range(4):
            progress.update(done, loss=1.5)
    if fail:
        raise eval(fail)
    write_result("test_job", settings, settings.seed, {"loss": 1.5}, json)
    return status

if __name__ == "__main__":
    run(main)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs the job above as a process of its own."""
    path = tmp_path_factory.mktemp("job") / "job.py"
    path.write_text(JOB)

    def start(*args, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
        return subprocess.run(
            [sys.executable, str(path), *args], env=environment, capture_output=True, text=True, timeout=120, **options
        )

    return start


def python(code, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout


# --------------------------------------------------------------------------------------------------- help, options


def test_no_job_imports_torch_or_ray_before_it_has_parsed():
    modules = ", ".join(f"jobs.{name}" for name in JOBS)
    loaded = python(f"import {modules}, sys; print(sorted({{'torch', 'ray', 'transformers'}} & set(sys.modules)))")
    assert loaded.strip() == "[]"


def test_help_explains_the_shared_options(job):
    result = job("--help")
    assert result.returncode == 0
    assert "A job for a test." in result.stdout
    for option in ("--config FILE", "--set SECTION.KEY=VALUE", "--seed INTEGER", "--json FILE"):
        assert option in result.stdout


@pytest.mark.serial
def test_help_answers_in_under_a_second(job):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert job("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_settings_come_from_file_then_set_then_seed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nsearch: {simulations: 5}\nstage_1: {steps: 7}\n")
    settings = command.load_settings(path, ["search.simulations=6", "seed=2"], seed=3)
    assert (settings.seed, settings.search.simulations, settings.stage_1.steps) == (3, 6, 7)
    assert command.load_settings(path).seed == 1
    assert command.load_settings() == Config()


def test_options_reach_the_job():
    seen = {}

    def main(
        config: ConfigOption = None, overrides: SetOption = None, seed: SeedOption = None, json: JsonOption = None
    ) -> None:
        seen.update(config=config, overrides=overrides, seed=seed, json=json)

    assert command.invoke(main, []) == 0
    assert seen == {"config": None, "overrides": None, "seed": None, "json": None}
    assert command.invoke(main, ["--config", "a.yaml", "--set", "a.b=1", "--set", "c=2", "--seed", "4"]) == 0
    assert seen == {"config": Path("a.yaml"), "overrides": ["a.b=1", "c=2"], "seed": 4, "json": None}


# --------------------------------------------------------------------------------------------------- exit status


def app_that(action):
    def main() -> object:
        return action()

    return main


def throw(error):
    raise error


class FarError(RuntimeError, ValueError):
    """Like an error that crossed a process: its text is a traceback, its cause the real one."""

    cause = ValueError("lag = -1;\n   allowed: at least 0")

    def __str__(self):
        return "Traceback\n  File\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lag = -1;\n   allowed: at least 0"), "error: lag = -1; allowed: at least 0"),
        (FarError(), "error: lag = -1; allowed: at least 0"),
        (OSError(28, "No space left on device", "/full/x"), "error: /full/x: No space left on device"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (OSError("odd"), "error: odd"),
        (ValueError(), "error: ValueError"),
    ],
)
def test_bad_input_and_a_refusing_machine_are_one_line_and_status_2(error, line, capsys, monkeypatch):
    monkeypatch.delenv("CRSM_DEBUG", raising=False)
    assert command.invoke(app_that(lambda: throw(error)), []) == 2
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert captured.out == ""


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("CRSM_DEBUG", "1")
    with pytest.raises(ValueError, match="lag"):
        command.invoke(app_that(lambda: throw(ValueError("lag"))), [])


def test_our_own_mistakes_keep_their_traceback(job):
    with pytest.raises(KeyError):
        command.invoke(app_that(lambda: throw(KeyError("x"))), [])
    result = job("--fail", "KeyError('x')")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize("args", [["--nonsense"], ["--seed", "x"], ["--seed"], ["surplus"]])
def test_wrong_options_are_one_line_and_status_2(args, capsys):
    def main(seed: SeedOption = None) -> None: ...

    assert command.invoke(main, args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and args[0].strip("-") in error


@pytest.mark.parametrize(
    ("action", "status", "shown"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: throw(typer.Exit(4)), 4, ""),
        (lambda: throw(typer.Abort()), 1, "error: aborted\n"),
        (lambda: throw(KeyboardInterrupt()), 130, ""),
        (lambda: sys.exit(5), 5, ""),
        (lambda: sys.exit("it did not converge"), 1, "it did not converge\n"),
    ],
)
def test_the_status_is_what_the_job_says(action, status, shown, capsys):
    assert command.invoke(app_that(action), []) == status
    assert capsys.readouterr().err == shown


def test_errors_decorator_works_outside_a_command_line(capsys):
    @command.one_line_errors()
    def load():
        raise ValueError("no")

    with pytest.raises(SystemExit) as exit_:
        load()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no\n"


def test_an_application_without_a_command_shows_its_help(capsys):
    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    app.command("one")(lambda: None)
    app.command("two")(lambda: None)
    assert command.invoke(app, []) == 2
    captured = capsys.readouterr()
    assert "Commands:" in captured.out + captured.err
    assert command.invoke(app, ["one"]) == 0


# --------------------------------------------------------------------------------------------------- result file


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Figure:
    mean: float
    by_lag: dict


def test_the_record_has_the_documented_keys_and_is_json(tmp_path):
    path = tmp_path / "new folder" / "result.json"
    results = {
        "numpy": np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.tensor([[1.0, float("nan")]]),
        "infinite": float("inf"),
        "figure": Figure(1.0, {0: True, 1: None}),
        "enum": {Colour.RED: Colour.RED},
        "path": Path("a/b"),
        "text": "α = 0.2",
    }
    returned = command.write_result("job", Config(seed=9), 9, results, path)
    text = path.read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == returned
    assert list(record) == ["job", "commit", "config", "seed", "machine", "results"]
    assert list(record["machine"]) == ["cpu", "cores", "gpu", "torch"]
    assert record["machine"]["torch"] == torch.__version__
    assert record["config"] == Config(seed=9).model_dump(mode="json")
    assert record["results"] == {
        "numpy": 0.5,
        "array": [0, 1, 2],
        "tensor": [[1.0, None]],
        "infinite": None,
        "figure": {"mean": 1.0, "by_lag": {"0": True, "1": None}},
        "enum": {"red": "red"},
        "path": "a/b",
        "text": "α = 0.2",
    }
    assert "α" in text
    assert path.stat().st_mode & 0o777 == 0o666 & ~command._umask()


def test_a_record_can_be_made_without_being_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.write_result("job", {}, 0, {}, None)["job"] == "job"
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="object"):
        command.write_result("job", {}, 0, {"x": object()}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(str(path))) as error:
        command.write_atomically(path, "new")
    assert error.value.errno == 28
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_may_not_grow_is_named_in_one_line(job, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    result = job("--json", str(tmp_path / "r.json"), preexec_fn=limit)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path / 'r.json'}: File too large"
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_not_replaced(job):
    result = job("--json", "/dev/full")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: /dev/full: No space left on device"
    assert Path("/dev/full").is_char_device()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    command.write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"


def test_an_unwritable_result_file_is_refused_before_the_work(job, tmp_path):
    result = job("--json", str(tmp_path))
    assert result.returncode == 2
    assert "is a directory" in result.stderr and "work:" not in result.stderr
    (tmp_path / "file").write_text("")
    result = job("--json", str(tmp_path / "file" / "r.json"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "work:" not in result.stderr


def test_standard_output_holds_the_json_only(job):
    result = job("--json", "-", "--seed", "5")
    assert result.returncode == 0
    record = json.loads(result.stdout)
    assert (record["job"], record["seed"], record["config"]["seed"]) == ("test_job", 5, 5)
    assert record["results"] == {"loss": 1.5}
    assert (
        "noise from Python" in result.stderr and "noise from a child" in result.stderr and "work: 3/3" in result.stderr
    )
    assert "noise from a child" in job().stdout, "without --json - the output stays where it was"


def test_standard_output_is_given_back(capfd):
    def main(json: JsonOption = None) -> None:
        print("during")
        command.write_result("job", {}, 0, {}, json)

    assert command.invoke(main, ["--json", "-"]) == 0
    print("after")
    captured = capfd.readouterr()
    assert captured.err == "during\n"
    assert captured.out.endswith("}\nafter\n") and captured.out.startswith("{")


def test_standard_output_in_memory_works_too(capsys):
    def main(json: JsonOption = None) -> None:
        print("during")
        command.write_result("job", {}, 0, {}, json)

    assert command.invoke(main, ["--json", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "during\n" and json.loads(captured.out)["job"] == "job"


CHATTY = """
import time
from jobs.command import *

def main(json: JsonOption = None) -> None:
    time.sleep(0.3)
    print("x" * 100_000)
    write_result("job", {}, 0, {"x": "x" * 100_000}, json)

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize("args", [[], ["--json", "-"]])
def test_a_reader_that_leaves_is_no_error(args, tmp_path):
    (tmp_path / "chatty.py").write_text(CHATTY)
    with (tmp_path / "errors").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "chatty.py"), *args],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        process.stdout.close()
        assert process.wait(60) == 1
    assert (tmp_path / "errors").read_text().replace("x", "").strip() == ""


def git(*args, cwd):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *args], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_names_the_checkout_and_whether_it_was_changed(tmp_path, monkeypatch):
    read = command.commit.__wrapped__
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert read() == crsm.__version__, "no repository"
    git("init", "-q", cwd=tmp_path)
    assert read() == crsm.__version__, "no commit"
    (tmp_path / "a").write_text("1")
    git("add", "a", cwd=tmp_path)
    git("commit", "-q", "-m", "one", cwd=tmp_path)
    head = git("rev-parse", "HEAD", cwd=tmp_path)
    assert read() == head
    (tmp_path / "result.json").write_text("{}")
    assert read() == head, "a new file beside the code is no change of the code"
    (tmp_path / "a").write_text("2")
    assert read() == f"{head}-dirty"
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(command, "ROOT", tmp_path / "site-packages")
    assert read() == crsm.__version__, "installed inside another repository"


# --------------------------------------------------------------------------------------------------- progress


def test_plain_progress_shows_first_last_and_one_line_per_interval():
    now = 0.0
    stream = io.StringIO()
    with Progress("stage 1", 100, stream=stream, interval=5.0, clock=lambda: now) as progress:
        for done in range(1, 101):
            now = done * 0.1
            progress.update(done, loss=0.123456, tokens_per_second=12345.6, note="warm")
            if done == 60:
                progress.say("half way")
    assert stream.getvalue().splitlines() == [
        "stage 1: 1/100, 0 s, about 10 s left, loss 0.1235, tokens_per_second 12,346, note warm",
        "stage 1: 51/100, 5 s, about 5 s left, loss 0.1235, tokens_per_second 12,346, note warm",
        "half way",
        "stage 1: 100/100, 10 s, loss 0.1235, tokens_per_second 12,346, note warm",
    ]


def test_what_was_done_before_is_no_measure_of_speed() -> None:
    stream, now = io.StringIO(), [0.0]
    with Progress("sweep", 20, begun=10, stream=stream, interval=0.0, clock=lambda: now[0]) as progress:
        progress.update(10)
        now[0] = 8.0
        progress.update(12)
    assert stream.getvalue().splitlines() == ["sweep: 10/20, 0 s", "sweep: 12/20, 8 s, about 32 s left"]


def test_progress_shows_the_last_state_before_a_failure():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress("work", stream=stream, clock=lambda: 0.0) as progress:
        progress.update(1)
        progress.update(2)
        raise ValueError("no")
    assert stream.getvalue().splitlines() == ["work: 1, 0 s", "work: 2, 0 s"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        with Progress("stage [1]", 10, stream=terminal) as progress:
            progress.update(10, loss=0.5)
            progress.say("a line [that] stays")
    shown = b""
    with contextlib.suppress(OSError):  # what a closed terminal answers once everything was read
        while more := os.read(parent, 65536):
            shown += more
    os.close(parent)
    for text in ("stage [1]", "10/10", "loss 0.5", "a line [that] stays"):
        assert text in shown.decode()
