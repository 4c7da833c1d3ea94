"""Stage 1: backbone, fusion and critics, on solutions and on attempts with their verdict."""

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
    """Train stage 1: backbone, fusion and critics.

    Makes a new model, or goes on from the weights of --checkpoint (an imported one, or one trained on easier problems).
    """
    settings = load_settings(config, overrides, seed)
    storage, name = locate(settings, storage, name)
    if fresh:
        put_aside(run_folder(storage, name) / "stage_1")
    with one_line_failure():
        outcome = train_stage("stage_1", settings, checkpoint, storage, name)
    print(describe_outcome(outcome), file=sys.stderr)
    results = {"checkpoint": str(outcome.checkpoint), "had_finished": outcome.had_finished, **outcome.report}
    write_result("stage_1_backbone", settings, settings.seed, results, json)


if __name__ == "__main__":
    run(main)
