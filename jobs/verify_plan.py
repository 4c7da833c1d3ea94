"""Holds ``crsm plan`` against real steps of stage 1 on this machine: live tensor bytes, and what the process grew by.

Every size runs in a process of its own: one step that makes the optimizer's moments, then the steps that are measured.
*Tensors* is the largest sum of the storages that were alive at once, counted at every operation of the forward and the
backward pass and of the optimizer. *Process* is the peak of the resident memory over what the process had before the
model was built, in a run of its own without counting, with an allocator that gives freed blocks back at once (glibc
keeps them by default and grows by up to a fifth more). A config that does not fit within ``--limit`` loses layers, and
its row says so; width, vocabulary and length of the rows stay.
"""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.command import ROOT, JsonOption, run, write_result

DEFAULT = ("nano", "baseline_170m", "baseline_350m", "1b", "3b")
TOLERANCE = 0.10


def main(
    configs: Annotated[list[Path] | None, typer.Argument(help="Settings; none: nano and the four large ones.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of text of a micro-batch.")] = 1,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a row.")] = 512,
    limit: Annotated[float, typer.Option("--limit", help="Gigabytes that a run may take.")] = 8.0,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
    json: JsonOption = None,
) -> int:
    """Compare the plan's memory with that of real steps; exit status 1 if one differs by more than 10 %."""
    results = []
    for path in configs or [ROOT / "configs" / f"{name}.yaml" for name in DEFAULT]:
        task = {"config": str(path), "rows": rows, "length": length, "limit": limit, "overrides": overrides or []}
        found = _measure(task | {"count": True}) | {"process": _measure(task | {"count": False})["process"]}
        found["tensors_error"] = found["planned"] / found["tensors"] - 1
        found["process_error"] = found["planned"] / found["process"] - 1
        results.append(found)
        print(_line(found), file=sys.stderr, flush=True)
    wrong = [found["name"] for found in results if abs(found["tensors_error"]) > TOLERANCE]
    write_result("verify_plan", {}, 0, {"sizes": results, "tolerance": TOLERANCE, "beyond": wrong}, json)
    return 1 if wrong else 0


def _line(found: dict[str, Any]) -> str:
    gigabytes = {key: found[key] / 1e9 for key in ("planned", "tensors", "process")}
    return (
        f"{found['name']}, {found['layers']} of {found['all_layers']} layers, {found['shape']}: "
        f"planned {gigabytes['planned']:.3f} GB, tensors {gigabytes['tensors']:.3f} ({found['tensors_error']:+.1%}), "
        f"process {gigabytes['process']:.3f} ({found['process_error']:+.1%})"
    )


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "jobs.verification.plan_memory", jsonlib.dumps(task)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise OSError(f"measuring {task['config']} ended with status {done.returncode}")
    found: dict[str, Any] = jsonlib.loads(done.stdout)
    return found


if __name__ == "__main__":
    run(main)
