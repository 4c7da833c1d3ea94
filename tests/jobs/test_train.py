"""Training jobs, as far as they go without Ray: folders, refusals, plans of roll-outs, the report's picture."""

import errno
import json
import struct

import pytest

from crsm.config import Config, load_config
from jobs import command, pipeline, runs, stage_3_value_head, train, train_worker
from jobs.preemption import SHORTEST, SaveOnNotice
from jobs.report import draw_report, series, summary_lines
from jobs.stage_3_value_head import accuracies, plan_jobs
from jobs.storage import StoragePath

# ------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["", "a/b", "..", "/abs", "."])
def test_a_run_has_a_folders_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"name = '{name}'; allowed"):
        runs.run_folder(tmp_path, name)


def test_runs_lie_in_a_folder_or_in_an_object_store(tmp_path):
    assert runs.run_folder(tmp_path, "nano").local == tmp_path / "nano"
    assert str(runs.run_folder("s3://bucket/runs", "nano")) == "s3://bucket/runs/nano"
    with pytest.raises(ValueError, match="storage = 'ftp://host'; allowed: a folder, s3://"):
        runs.run_folder("ftp://host", "nano")


def test_options_win_over_settings(tmp_path):
    settings = load_config(None, ["name=a", f"train.storage_path={tmp_path}"])
    assert runs.locate(settings, None, None) == (str(tmp_path), "a")
    assert runs.locate(settings, "s3://bucket/x", "b") == ("s3://bucket/x", "b")


def test_an_input_on_the_drivers_disk_goes_to_the_object_store_and_stays_where_it_is_for_a_folder(
    tmp_path, monkeypatch
):
    source = finished(tmp_path, "stage_1")
    uploads = []
    monkeypatch.setattr(StoragePath, "is_file", lambda self: self.local is not None)
    monkeypatch.setattr(StoragePath, "upload", lambda self, path, last: uploads.append((str(self), path, last)))
    assert runs.within_reach(source, StoragePath.of(tmp_path / "elsewhere")) == source
    assert uploads == []
    there = runs.within_reach(source, StoragePath.of("s3://bucket/run/stage_2"))
    assert uploads == [("s3://bucket/run/stage_2/input/0123456789abcdef", source.local, "config.json")]
    assert str(there) == uploads[0][0]
    far = StoragePath.of("s3://other/checkpoint")
    assert runs.within_reach(far, there) == far


def finished(tmp_path, *stages):
    for stage in stages:
        folder = tmp_path / "run" / stage / "checkpoint"
        folder.mkdir(parents=True)
        hashed = {"files": {"model.safetensors": {"sha256": "0123456789abcdef" * 4}}}
        (folder / "config.json").write_text(json.dumps(hashed))
    return StoragePath.of(folder)


def test_a_stage_starts_from_the_nearest_earlier_one(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint of stage_2 or stage_1 .*--checkpoint DIR"):
        runs.previous_checkpoint("stage_3", tmp_path, "run")
    finished(tmp_path, "stage_1", "stage_2")
    assert runs.previous_checkpoint("stage_2", tmp_path, "run").parent.name == "stage_1"
    assert runs.previous_checkpoint("stage_4", tmp_path, "run").parent.name == "stage_2"


def test_fresh_puts_aside_and_loses_nothing(tmp_path):
    folder = tmp_path / "run" / "stage_1"
    for content in ("first", "second"):
        (tmp_path / "run" / "tensorboard" / "stage_1").mkdir(parents=True)
        folder.mkdir(parents=True)
        (folder / "file").write_text(content)
        runs.put_aside(folder)
    runs.put_aside(folder)  # nothing there: nothing to do
    assert (tmp_path / "run" / "stage_1.old-1" / "file").read_text() == "first"
    assert (tmp_path / "run" / "stage_1.old-2" / "file").read_text() == "second"
    assert {path.name for path in (tmp_path / "run" / "tensorboard").iterdir()} == {"stage_1.old-1", "stage_1.old-2"}


@pytest.mark.parametrize("text", ["", "5", "2,1", "1,1", "one", "1-4"])
def test_stages_are_named_in_order(text):
    with pytest.raises(ValueError, match="stages = "):
        pipeline.parse_stages(text)
    assert pipeline.parse_stages("1, 2,4") == ["stage_1", "stage_2", "stage_4"]


# ------------------------------------------------------------------------------------------------------ refusals


def test_stages_but_the_first_need_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="stage_2 starts from a checkpoint"):
        train.train_stage("stage_2", Config(), None, tmp_path, "run")
    with pytest.raises(ValueError, match="stage_5"):
        train.train_stage("stage_5", Config(), None, tmp_path, "run")
    with pytest.raises(ValueError, match=r"checkpoint = .*nothing"):
        train.train_stage("stage_2", Config(), tmp_path / "nothing", tmp_path, "run")


def test_a_run_of_other_settings_is_refused_before_ray_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "_fit", lambda work, config, callbacks: None)
    monkeypatch.setattr(train, "cluster", lambda: __import__("contextlib").nullcontext())
    with pytest.raises(RuntimeError, match="ended without a checkpoint"):
        train.train_stage("stage_1", Config(), None, tmp_path, "run")
    # What does not change the course may change.
    with pytest.raises(RuntimeError):
        train.train_stage("stage_1", load_config(None, ["stage_1.log_every=7"]), None, tmp_path, "run")
    config = load_config(None, ["stage_1.optimizer.lr=0.5"])
    with pytest.raises(ValueError, match=r"stage_1\.optimizer\.lr = 0\.002; the settings ask 0\.5; allowed.*--fresh"):
        train.train_stage("stage_1", config, None, tmp_path, "run")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["train.workers=1000"], r"stage_1 with train.workers = 1000 asks 1000 CPU; the cluster has \d+\."),
        (["train.use_gpu=true"], r"stage_1 with train.workers = 1 asks 1 GPU; the cluster has 0\."),
        (
            ["train.workers=2000", "train.min_workers=1000"],
            r"stage_1 with train.min_workers = 1000 asks 1000 CPU; the cluster has \d+\.",
        ),
    ],
)
def test_a_cluster_that_is_too_small_says_so_at_once(tmp_path, monkeypatch, changes, line):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=line):
        train.train_stage("stage_1", load_config(None, changes), None, tmp_path, "run")


def test_a_cluster_that_grows_counts_as_large_as_it_can_become(monkeypatch):
    import ray
    from ray._private.state import state

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 1, "GPU": 4})
    train.require_resources({"CPU": 2, "GPU": 4}, "it")
    with pytest.raises(ValueError, match="it asks 5 GPU; the cluster has 4"):
        train.require_resources({"GPU": 5}, "it")
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    with pytest.raises(ValueError, match="it asks 1 GPU; the cluster has 0"):
        train.require_resources({"GPU": 1}, "it")


@pytest.mark.parametrize("storage", ["/proc/runs", "{}/file/runs"])
def test_a_storage_that_cannot_be_written_is_named_at_once(storage, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the storage cannot be written") as raised:
        train.train_stage("stage_1", Config(), None, storage.format(tmp_path), "run")
    assert "runs/run/stage_1" in raised.value.filename


def test_a_submitted_job_keeps_nothing_in_its_working_directory(tmp_path, monkeypatch):
    working = tmp_path / "working_dir_files" / "_ray_pkg_01"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    monkeypatch.delenv("CRSM_STORAGE", raising=False)
    with pytest.raises(ValueError, match=r"storage = 'runs' in the working directory of a submitted job.*CRSM_STORAGE"):
        runs.run_folder("runs", "nano")
    assert runs.run_folder(tmp_path / "mine", "nano").local == tmp_path / "mine" / "nano"
    assert str(runs.run_folder("s3://bucket/mine", "nano")) == "s3://bucket/mine/nano"
    monkeypatch.setenv("CRSM_STORAGE", str(tmp_path / "shared"))
    assert runs.run_folder("runs", "nano").local == tmp_path / "shared" / "runs" / "nano"
    monkeypatch.setenv("CRSM_STORAGE", "s3://bucket/crsm")
    assert str(runs.run_folder("runs", "nano")) == "s3://bucket/crsm/runs/nano"
    monkeypatch.chdir(tmp_path)
    assert runs.run_folder("runs", "nano").local == tmp_path / "runs" / "nano"


def test_no_more_workers_are_enough_than_are_asked_for():
    with pytest.raises(ValueError, match="min_workers = 3; allowed: at most workers = 2"):
        load_config(None, ["train.workers=2", "train.min_workers=3"])


class FromWorkers(Exception):
    def __init__(self, failure):
        self.worker_failures = {0: failure}


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full"), "/full: No space left on device"),
        (OSError("odd"), "odd"),
        (ValueError("batch = 1; allowed: 2"), "batch = 1; allowed: 2"),
    ],
)
def test_what_a_user_can_mend_comes_out_of_the_workers_as_it_is(failure, line):
    with pytest.raises(type(failure)) as error:
        train._raise_cause(FromWorkers(failure))
    assert command.describe(error.value) == line
    with pytest.raises(FromWorkers):
        train._raise_cause(FromWorkers(KeyError("ours")))


def test_numbers_that_explode_are_one_line_and_status_1(capsys):
    def main() -> None:
        with train.one_line_failure():
            raise FloatingPointError("stage_1, step 3: loss = nan")

    assert command.invoke(main, []) == 1
    assert capsys.readouterr().err == "error: stage_1, step 3: loss = nan\n"


# ----------------------------------------------------------------------------------------------------- preemption


class Notices:
    """Ray Train's notice and a clock, both set by hand."""

    def __init__(self):
        self.notice, self.now = None, 100.0
        self.saves = SaveOnNotice(lambda: self.notice, lambda: self.now)

    def is_due_at(self, now):
        self.now = now
        return self.saves.is_due()


def test_without_a_notice_nothing_is_saved_before_its_time():
    notices = Notices()
    assert not notices.is_due_at(100.0)
    notices.saves.saved(1.0)
    assert not notices.is_due_at(1000.0)


def test_a_notice_is_answered_at_once_and_again_as_long_as_it_stands():
    notices = Notices()
    notices.notice = "node a"
    assert notices.is_due_at(101.0) and notices.is_due_at(101.1)  # until a state was saved
    notices.saves.saved(0.1)
    assert not notices.is_due_at(101.1 + 0.9 * SHORTEST)
    assert notices.is_due_at(101.1 + SHORTEST)
    notices.saves.saved(10.0)  # where saving is slow, no more than a fifth of the time goes into it
    assert not notices.is_due_at(notices.now + 49.0)
    assert notices.is_due_at(notices.now + 51.0)


def test_news_after_a_slow_state_do_not_wait_for_its_pause():
    notices = Notices()
    notices.saves.saved(10.0)
    notices.notice = "node a"
    assert not notices.is_due_at(100.0)  # another worker has asked for that one
    assert notices.is_due_at(100.0 + SHORTEST)
    notices.saves.saved(10.0)
    notices.notice = "nodes a, b"
    assert notices.is_due_at(notices.now + SHORTEST)


# ---------------------------------------------------------------------------------------------------------- gates


class Previous:
    def __init__(self, report):
        self.report = report


@pytest.mark.parametrize(
    ("report", "may_open", "why"),
    [
        ({"stage_3": {"branch_accuracy": 0.95}}, True, ""),
        ({"stage_3": {"branch_accuracy": 0.9}}, True, ""),
        ({"stage_3": {"branch_accuracy": 0.89}}, False, "0.89 is below stage_3.gate_accuracy = 0.9"),
        ({"stage_3": {"branch_accuracy": None}}, False, "None is below"),
        ({}, False, "stage 3 has not measured"),
    ],
)
def test_gates_open_only_for_a_measured_judge(report, may_open, why):
    found, reason = train_worker.gates_may_open(Previous(report), Config())
    assert found is may_open and why in reason


# ------------------------------------------------------------------------------------------------------ roll-outs


def test_every_problem_is_rolled_out_once_by_each_system():
    settings = load_config(None, ["stage_3.problems=301"])
    jobs = plan_jobs(settings, 0)
    seen = [(job.task, job.system, i) for job in jobs for i in range(job.first, job.first + job.count)]
    assert len(seen) == len(set(seen)) == 2 * 301
    counts = {task: sum(1 for s in seen if s[0] == task and s[1] == 1) for task in ("path_star", "tree_path")}
    assert sorted(counts.values()) == [150, 151]
    assert all(job.split == "train" and job.count <= stage_3_value_head.CHUNK for job in jobs)
    assert {job.problem_seed for job in jobs}.isdisjoint(job.problem_seed for job in plan_jobs(settings, 1))


def test_a_task_that_system_2_is_not_taught_is_not_rolled_out():
    settings = load_config(None, ["tasks.tree_path.plan=false", "stage_3.problems=50"])
    jobs = plan_jobs(settings, 0)
    assert {job.task for job in jobs} == {"path_star"}
    assert sum(job.count for job in jobs if job.system == 1) == 50


def test_accuracies_by_task_and_system():
    records = [{"task": "a", "system": 1 + i % 2, "correct": i < 3} for i in range(4)]
    assert accuracies(records) == {"a": {1: 1.0, 2: 0.5}}


# --------------------------------------------------------------------------------------------------------- report


def reports():
    curve = [{"step": float(s), "loss": 3.0 / s, "lr": 0.1, "seconds": 1.0} for s in (1, 2, 3)]
    common = {"steps": 3, "seconds": 12.0, "tokens_per_second": 1234.5}
    rows = [
        {"step": s, "policy_kl": 0.1 * s, "value_error": 0.05, "branch_accuracy": None if s == 1 else 0.9}
        for s in (1, 2)
    ]
    auc = [{"step": 3.0, "valid/value_auc/path_star/layer_0": 0.9, "valid/value_auc/path_star/layer_1": None}]
    follow = [{"step": 3.0, "valid/follow_rate/path_star": 0.8, "valid/after_kl/path_star": 0.01}]
    return {
        "stage_1": {**common, "curve": curve + auc},
        "stage_2": {**common, "curve": curve, "fidelity": {"path_star": rows}, "trust_horizon": 2},
        "stage_3": {
            **common,
            "curve": curve,
            "judgment": {"path_star": {"imagined_branch_accuracy": 0.95}},
            "branch_accuracy": 0.95,
            "rounds": [{"round": 1, "accuracy": {"path_star": {"1": 0.33, "2": 0.95}}}],
        },
        "stage_4": {**common, "curve": curve + follow, "gates": {"open": False, "reason": "because " * 12}},
    }


def test_the_picture_is_a_picture_whatever_stages_there_are(tmp_path):
    everything = reports()
    for stages in (["stage_1"], ["stage_1", "stage_2"], list(everything)):
        path = tmp_path / f"{len(stages)}.png"
        draw_report({stage: everything[stage] for stage in stages}, path, "run: training")
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 1200 and height >= 700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png", "4.png"]


def test_curves_are_found_by_name():
    found = series(reports()["stage_1"], "valid/value_auc/")
    assert found == {"path_star/layer_0": ([3.0], [0.9])}
    assert series(reports()["stage_1"], "loss") == {"": ([1.0, 2.0, 3.0], [3.0, 1.5, 1.0])}


def test_the_summary_tells_time_accuracy_and_gates():
    text = "\n".join(summary_lines(reports()))
    assert "48" in text and "System 2 0.95" in text and "0.950" in text and "gates shut" in text
    opened = reports()
    opened["stage_4"]["gates"] = {"open": True, "written": 0.4, "written_right": 0.97}
    assert "0.97 of those right" in "\n".join(summary_lines(opened))


def test_the_report_of_imported_weights_has_an_entry_that_is_no_stage(tmp_path):
    imported = {"import": {"source": "state-spaces/mamba2-130m", "layout": "mamba-ssm", "tensors": 243}, **reports()}
    assert list(summary_lines(imported)) == list(summary_lines(reports()))
    draw_report(imported, tmp_path / "report.png", "run: training")


def test_numbers_that_json_lacks_become_null():
    plain = train_worker.finite({"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert json.dumps(plain) == '{"a": [null, 1.5], "b": [null]}'
