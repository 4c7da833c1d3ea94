"""The script for Slurm, and the Dockerfile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jobs.checks.command_lines import command_line_problems

_SBATCH = set(
    "account array begin chdir comment constraint cpus-per-gpu cpus-per-task dependency error exclude exclusive export "
    "gpus gpus-per-node gpus-per-task gres input job-name licenses mail-type mail-user mem mem-per-cpu mem-per-gpu "
    "network nodelist nodes no-requeue ntasks ntasks-per-node open-mode output partition qos requeue reservation "
    "signal time time-min tmp wait-all-nodes".split()
)
"""Options of sbatch that make sense in a script."""


def slurm_problems(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"#\s*[A-Z]+ --", line):
            option = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line.strip())
            if option is None or option[1] not in _SBATCH:
                yield f"line {number}: {line.strip()}: no option of sbatch"
    yield from command_line_problems(text)
    if "RAY_AUTH_MODE=token" not in text:
        yield "Ray is started without RAY_AUTH_MODE=token: other users of the nodes could run code"


_INSTRUCTIONS = set(
    "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL RUN SHELL STOPSIGNAL USER VOLUME WORKDIR".split()
)


def dockerfile_problems(text: str, root: Path) -> Iterator[str]:
    stages: dict[str, list[str]] = {}
    stage = ""
    without_comments = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in filter(None, map(str.strip, re.sub(r"\\\n", " ", without_comments).splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction not in _INSTRUCTIONS:
            yield f"{line[:60]}: no instruction of a Dockerfile"
        elif instruction == "FROM":
            named = re.fullmatch(r"\S+ AS ([a-z]+)", rest)
            if named is None:
                yield f"{line}; allowed: FROM IMAGE AS NAME"
            stage = named[1] if named else stage
            stages[stage] = []
        elif instruction == "RUN":
            stages.setdefault(stage, []).append(rest)
            yield from (f"RUN {rest[:40]}…: {problem}" for problem in command_line_problems(rest))
            for script in re.findall(r"\bscripts/\S+", rest):
                if not (root / script).is_file():
                    yield f"RUN {script}: no such file"
        elif instruction in ("COPY", "ADD"):
            for source in rest.split()[:-1]:
                if not source.startswith("--") and not (root / source).exists():
                    yield f"{line}: {source} is not there"
    for target in ("cpu", "cuda"):
        if target not in stages:
            yield f"target {target} is missing"
        elif not any(re.search(r"\bmake setup EDITABLE=$", command) for command in stages[target]):
            yield f"target {target} does not install the project by `make setup EDITABLE=`, as CI does by `make setup`"
