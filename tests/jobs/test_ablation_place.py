"""The output folder of a sweep: a folder, or a place in an object store, where the same is kept in another form."""

from pathlib import Path

import pyarrow.fs
import pyarrow.parquet
import pytest

from jobs.ablation.place import SWEEP_FILE, add_ended, drawing_folder, open_folder, output_place, read_ended
from jobs.ablation.table import write_table
from jobs.storage import StoragePath
from tests.jobs.local_object_store import CREDENTIALS, start_object_store


@pytest.fixture(scope="module")
def store():
    with start_object_store() as store:
        store.bucket("sweeps")
        yield store


@pytest.fixture(params=["folder", "bucket"])
def folder(request, store, tmp_path, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    if request.param == "folder":
        return StoragePath.of(tmp_path / "out")
    return StoragePath.of(store.uri(f"sweeps/{tmp_path.name}/out"))


def test_what_has_ended_is_kept_in_any_storage(folder):
    assert read_ended(folder) == []
    entries = [{"trial": number, "seed": number % 3, "point": {"lag": number}} for number in (0, 2, 1, 11)]
    for entry in entries:
        add_ended(folder if folder.scheme else made(folder), entry)
    assert sorted(read_ended(folder), key=lambda entry: entry["trial"]) == sorted(entries, key=lambda e: e["trial"])


def made(folder):
    folder.local.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_sweep_is_begun_resumed_with_the_same_settings_and_put_aside_otherwise(folder, capsys):
    with pytest.raises(ValueError, match=r"nothing to resume in .*out.*; allowed: an output folder of this job"):
        open_folder(folder, {"seed": 1}, resume=True)
    open_folder(folder, {"seed": 1}, resume=False)
    add_ended(folder, {"trial": 0})
    open_folder(folder, {"seed": 1}, resume=True)
    with pytest.raises(ValueError, match="made with seed = 1; the settings ask 2; allowed: the same settings"):
        open_folder(folder, {"seed": 2}, resume=True)
    assert read_ended(folder) == [{"trial": 0}]
    open_folder(folder, {"seed": 2}, resume=False)
    assert "held a sweep; it is put aside" in capsys.readouterr().err
    assert read_ended(folder) == [] and read_ended(folder.with_name("out.old-1")) == [{"trial": 0}]


def test_what_is_no_sweep_is_left_alone(folder):
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds something else; allowed: a new or empty folder"):
        open_folder(folder, {}, resume=False)
    assert (folder / "thesis.tex").read_text() == "mine" and not (folder / SWEEP_FILE).exists()


def test_tables_and_pictures_lie_in_any_storage(folder):
    table = [{"lag": 0, "accuracy": 0.5}, {"lag": 1, "accuracy": 0.75}]
    parquet, csv = write_table(table, folder)
    assert pyarrow.parquet.read_table(pyarrow.BufferReader(parquet.read_bytes())).to_pylist() == table
    assert csv.read_text().splitlines()[1:] == ["0,0.5", "1,0.75"]
    with drawing_folder(folder) as scratch:
        (scratch / "lag.png").write_bytes(b"a picture")
    assert (folder / "lag.png").read_bytes() == b"a picture"


def test_a_bucket_that_is_not_there_is_one_line_at_once(store, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="cannot be written: no such bucket"):
        open_folder(StoragePath.of(store.uri("nowhere/out")), {}, resume=False)


def test_a_relative_output_of_a_submitted_job_lies_below_the_storage_of_jobs(tmp_path, monkeypatch):
    assert output_place(None, Path("runs/ablations/x")) == StoragePath.of(Path("runs/ablations/x").resolve())
    assert output_place("s3://b/p", Path("x")) == StoragePath.of("s3://b/p")
    copy = tmp_path / "working_dir_files" / "job"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("CRSM_STORAGE", raising=False)
    with pytest.raises(ValueError, match=r"which is deleted with it; allowed: an absolute path, .* or CRSM_STORAGE"):
        output_place(None, Path("runs/ablations/x"))
    monkeypatch.setenv("CRSM_STORAGE", str(tmp_path / "kept"))
    assert output_place("out", Path("x")) == StoragePath.of(tmp_path / "kept" / "out")
    assert output_place(None, Path("runs/ablations/x")).local == tmp_path / "kept" / "runs" / "ablations" / "x"
    assert output_place(str(tmp_path / "there"), Path("x")).local == tmp_path / "there"
