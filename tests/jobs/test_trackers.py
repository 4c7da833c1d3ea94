"""Trackers: TensorBoard, W&B offline and MLflow in a file, each read back; what is missing; what fails on the way."""

import json
import struct
import sys

import pytest

from jobs import trackers
from jobs.storage import StoragePath
from jobs.trackers import StageTrackers, Tracked, Trackers, check_trackers, flat, open_trackers, read_ids
from tests.jobs.local_object_store import CREDENTIALS, start_object_store


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch, tmp_path):
    """No server and no key but what a test sets up."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")


def tracked(tmp_path, **changes):
    settings = {"seed": 3, "stage_1": {"batch": 8}}
    return Tracked(**({"run": "nano", "stage": "stage_1", "folder": tmp_path, "settings": settings} | changes))


def track(name, told, points):
    """Logs some points; the ids for the next start."""
    said = []
    opened, ids = open_trackers([name], told, said.append)
    for step, figures in points:
        opened.log(step, figures)
    opened.close()
    assert not said
    return ids


# ----------------------------------------------------------------------------------------------------- each one is read


def test_tensorboard_drops_what_a_stopped_start_wrote_after_its_last_state(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tracked(tmp_path), [(1, {"loss": 4.0}), (2, {"loss": 3.0}), (3, {"loss": 9.0})])
    track("tensorboard", tracked(tmp_path, step=2), [(3, {"loss": 2.0})])
    found = EventAccumulator(str(tmp_path / "tensorboard" / "stage_1")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]


def records(path):
    """The records of W&B's own file: blocks of 32 KiB, each record a checksum, a length, a kind and its bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline_holds_the_figures_and_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    ids = read_ids(None, ["wandb"])
    again = track("wandb", tracked(tmp_path, ids=ids), [(1, {"loss": 4.0}), (2, {"loss": 3.0, "lr": 0.5})])
    assert again == ids
    track("wandb", tracked(tmp_path, ids=again, step=2), [(3, {"loss": 2.0})])
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{ids['wandb']}/run-{ids['wandb']}.wandb"))
    assert files, list((tmp_path / "wandb").iterdir())
    rows, runs = [], []
    for path in files:
        for record in records(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
    found = [
        (row["_step"], {key: value for key, value in row.items() if not key.startswith("_")})
        for row in sorted(rows, key=lambda row: row["_step"])
    ]
    assert found == [(1, {"loss": 4.0}), (2, {"loss": 3.0, "lr": 0.5}), (3, {"loss": 2.0})]
    assert {(run.run_id, run.project, run.run_group, run.display_name) for run in runs} == {
        (ids["wandb"], "crsm", "nano", "nano/stage_1")
    }


def test_mlflow_holds_the_figures_and_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    ids = track("mlflow", tracked(tmp_path), [(1, {"loss": 4.0}), (2, {"loss": 3.0, "valid/loss@8": 0.5})])
    assert track("mlflow", tracked(tmp_path, ids=ids, step=2), [(3, {"loss": 2.0})]) == ids
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("crsm").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (ids["mlflow"], "nano/stage_1", "FINISHED")
    assert run.data.params == {"seed": "3", "stage_1.batch": "8"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert client.get_metric_history(run.info.run_id, "valid/loss at 8")


# ----------------------------------------------------------------------------------------------------------- of a stage


def test_the_curves_of_a_stage_that_goes_on_are_one_whether_its_run_lies_in_a_folder_or_a_bucket(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    settings = {"seed": 1, "stage_1": {"batch": 8}}
    with start_object_store() as store:
        store.bucket("runs")
        for place in (tmp_path / "nano" / "stage_1", store.uri("runs/nano/stage_1")):
            stage = StoragePath.of(place)
            first = StageTrackers(["tensorboard"], stage, settings, 0, pytest.fail)
            for step in (1, 2, 3):
                first.log({"step": step, "loss": 4.0 / step, "lr": 0.1, "tokens_per_second": 10.0})
            first.keep()  # and it is killed
            second = StageTrackers(["tensorboard"], stage, settings, 2, pytest.fail)
            second.log({"step": 3, "loss": 1.0})
            second.close()
            curves = fetched(stage.parent / "tensorboard" / "stage_1", tmp_path)
            found = EventAccumulator(str(curves)).Reload().Scalars("loss")
            assert [(event.step, event.value) for event in found] == [(1, 4.0), (2, 2.0), (3, 1.0)]


def fetched(place, tmp_path):
    if place.local is not None:
        return place.local
    place.download(tmp_path / "fetched")
    return tmp_path / "fetched"


def test_a_stage_keeps_the_ids_of_its_runs_beside_its_states(tmp_path):
    pytest.importorskip("wandb")
    stage = StoragePath.of(tmp_path / "nano" / "stage_1")
    StageTrackers(["wandb"], stage, {}, 0, pytest.fail).close()
    (run_id,) = json.loads((stage / "trackers.json").read_text()).values()
    StageTrackers(["wandb"], stage, {}, 5, pytest.fail).close()
    assert json.loads((stage / "trackers.json").read_text()) == {"wandb": run_id}
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "nano" / "wandb").glob("offline-run-*")} == {run_id}


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"train.trackers names '{name}', .*pip install 'crsm\[{name}\]'"):
        check_trackers(["tensorboard", name], "train.trackers")


def test_mlflow_without_a_server_needs_a_folder(monkeypatch):
    pytest.importorskip("mlflow")
    check_trackers(["mlflow"], "train.trackers", local=True)
    with pytest.raises(ValueError, match="the runs lie in an object store; allowed: MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"], "train.trackers", local=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_trackers(["mlflow"], "train.trackers", local=False)


def test_wandb_without_a_key_is_refused_before_it_asks_for_one(monkeypatch):
    pytest.importorskip("wandb")
    check_trackers(["wandb"], "train.trackers")  # offline
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match=r"no API key here; allowed: wandb login, WANDB_API_KEY, or WANDB_MODE=offli"):
        check_trackers(["wandb"], "train.trackers")


class Broken:
    def log(self, step, figures):
        raise ConnectionError("nobody\nanswers")

    def flush(self):
        raise AssertionError("it was left out")

    close = flush


class Kept:
    def __init__(self):
        self.seen = []

    def log(self, step, figures):
        self.seen.append((step, dict(figures)))

    def flush(self):
        self.seen.append("flushed")

    def close(self):
        self.seen.append("closed")


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on():
    said, kept = [], Kept()
    both = Trackers({"mlflow": Broken(), "tensorboard": kept}, said.append)
    both.log(1, {"loss": 1.0})
    both.log(2, {"loss": 0.5})
    both.flush()
    both.close()
    assert said == ["mlflow fails and is left out: nobody answers"]
    assert kept.seen == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), "flushed", "closed"]


def test_a_tracker_that_cannot_begin_does_not_keep_the_training_from_beginning(monkeypatch, tmp_path):
    said = []
    monkeypatch.setitem(trackers._KINDS, "wandb", lambda told: (_ for _ in ()).throw(RuntimeError("no server")))
    opened, ids = open_trackers(["wandb"], tracked(tmp_path), said.append)
    opened.log(1, {"loss": 1.0})
    opened.close()
    assert said == ["wandb fails and is left out: no server"] and ids == {}


def test_ids_are_kept_and_made_only_where_there_are_none():
    first = read_ids(None, ["tensorboard", "wandb", "mlflow"])
    assert set(first) == {"wandb"}, "MLflow gives its own"
    assert read_ids(json.dumps(first | {"mlflow": "m"}), ["wandb", "mlflow"]) == first | {"mlflow": "m"}
    assert read_ids('{"wandb": "cut sho', ["wandb"])["wandb"] != first["wandb"]


def test_settings_are_flattened_to_dotted_names():
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
