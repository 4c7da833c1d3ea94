"""Stage 2: the world model, on traces of the frozen backbone."""

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
    """Train stage 2: the world model, and measure how far it can be trusted.

    Starts from --checkpoint, or from what stage 1 of the same run left.
    """
    settings = load_settings(config, overrides, seed)
    storage, name = locate(settings, storage, name)
    if fresh:
        put_aside(run_folder(storage, name) / "stage_2")
    source = checkpoint or previous_checkpoint("stage_2", storage, name)
    with one_line_failure():
        outcome = train_stage("stage_2", settings, source, storage, name)
    print(describe_outcome(outcome), file=sys.stderr)
    results = {"checkpoint": str(outcome.checkpoint), "had_finished": outcome.had_finished, **outcome.report}
    write_result("stage_2_dynamics", settings, settings.seed, results, json)


if __name__ == "__main__":
    run(main)
