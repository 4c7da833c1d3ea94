"""Stage 4: the plan writer; then the gates are calibrated, or stay shut if stage 3 says so."""

from __future__ import annotations

import sys

from jobs.command import ConfigOption, JsonOption, SeedOption, SetOption, load_settings, run, write_result
from jobs.runs import (
    CheckpointOption,
    FreshOption,
    NameOption,
    StorageOption,
    describe_outcome,
    locate,
    previous_checkpoint,
    put_aside,
    run_folder,
)
from jobs.train import one_line_failure, train_stage


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    checkpoint: CheckpointOption = None,
    name: NameOption = None,
    storage: StorageOption = None,
    fresh: FreshOption = False,
) -> None:
    """Train stage 4: the plan writer; then calibrate the gates.

    Starts from --checkpoint, or from what stage 3 of the same run left. The gates stay shut if the pairwise branch
    accuracy that stage 3 measured is under stage_3.gate_accuracy, or was never measured.
    """
    settings = load_settings(config, overrides, seed)
    storage, name = locate(settings, storage, name)
    if fresh:
        put_aside(run_folder(storage, name) / "stage_4")
    source = checkpoint or previous_checkpoint("stage_4", storage, name)
    with one_line_failure():
        outcome = train_stage("stage_4", settings, source, storage, name)
    print(describe_outcome(outcome), file=sys.stderr)
    results = {"checkpoint": str(outcome.checkpoint), "had_finished": outcome.had_finished, **outcome.report}
    write_result("stage_4_assembly", settings, settings.seed, results, json)


if __name__ == "__main__":
    run(main)
