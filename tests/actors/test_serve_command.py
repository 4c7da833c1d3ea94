"""``crsm serve``: what is refused before anything starts, and one whole life of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.serve_command import args_of_options, check_port, serve_until_stopped
from actors.service_args import ServiceArgs
from jobs.command import invoke
from tests.actors.helpers import until

ROOT = Path(__file__).parents[2]


def test_options_become_arguments(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    args = args_of_options(
        "nano",
        name="mine",
        planners=3,
        replicas=2,
        api_key_file=keys,
        drain=7.0,
        overrides=["server.max_tokens=99", "search.simulations=8", "server.stream_interval=0.05"],
    )
    assert (args.checkpoint, args.name, args.planners, args.replicas) == ("nano", "mine", 3, 2)
    assert args.set == ("search.simulations=8",) and args.drain_seconds == 7.0
    assert (args.server.max_tokens, args.server.stream_interval) == (99, 0.05)
    assert args.server.keys({}) == ("secret",)
    assert args_of_options(str(tmp_path)).checkpoint == str(tmp_path.resolve()), "workers have another folder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "host = '0.0.0.0' is open to others, and there is no API key; allowed: 127.0.0.1, or"),
        (["--set", "server.max_token=1"], "unknown key 'server.max_token'; allowed:"),
        (["--set", "server.max_tokens=0"], "server.max_tokens = 0: Input should be greater than or equal to 1"),
        (["--set", "search.simulatoins=1"], "unknown key"),
        (["--checkpoint", "no/such"], "no/such"),
        (["--api-key-file", "no/such"], "api_key_file = "),
        (["--host", "no.such.host.invalid", "--api-key-file", "{keys}"], "host = 'no.such.host.invalid'"),
        (["--replicas", "0"], "'--replicas': Input should be greater than or equal to 1"),
        (["--port", "{taken}"], "port = {taken} is in use on 127.0.0.1; allowed: a free one (--port)"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_anything_starts(
    options: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from crsm.cli import app

    monkeypatch.delenv("CRSM_API_KEYS", raising=False)
    (tmp_path / "keys").write_text("secret\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = {"keys": tmp_path / "keys", "taken": taken.getsockname()[1]}
        status = invoke(app, ["serve", "--port", "1", *(option.format(**known) for option in options)])
    error = capsys.readouterr().err
    assert status == 2 and message.format(**known) in error and error.count("\n") == 1, error
    assert "secret" not in error


def test_a_port_that_nobody_may_listen_on_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.77:80"):
        check_port("192.0.2.77", 80)


def test_tracing_needs_its_package(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match="--tracing needs opentelemetry-sdk"):
        serve_until_stopped(ServiceArgs(), "127.0.0.1", free_port(), tracing=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.ray
def test_it_serves_until_it_is_told_to_stop_and_lets_streams_end(tmp_path: Path) -> None:
    port, keys = free_port(), tmp_path / "keys"
    keys.write_text("secret\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, "-m", "crsm.cli", "serve", "--port", str(port), "--api-key-file", str(keys)]
    said = tmp_path / "said"
    with open(said, "w") as file:
        process = subprocess.Popen([*command, "--set", "sampling.ignore_eos=true"], stderr=file, env=environment)
    try:
        until(lambda: "Ctrl-C stops" in said.read_text() or process.poll() is not None, 120)
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
        assert f"{url}/v1" in said.read_text() and "$CRSM_API_KEY" in said.read_text(), said.read_text()
        assert "secret" not in said.read_text()
        prompt = re.search(r'"prompt": "([^"]+)"', said.read_text())
        assert prompt is not None
        body = {"model": "nano", "prompt": prompt[1], "max_tokens": 60, "stream": True, "crsm": {"pace": 20}}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 401
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            *_, last = (line for line in lines if line)
            assert last == "data: [DONE]"
        assert process.wait(60) == 0
        assert "stopping: streams have 30 s to end" in said.read_text() and "Traceback" not in said.read_text()
    finally:
        process.kill()
        process.wait()
