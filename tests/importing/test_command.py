"""crsm import: what it writes and says, and that it writes nothing else."""

import json

import pytest

from crsm.cli import app
from crsm.model import load_checkpoint
from jobs.command import invoke
from tests.importing.sources import random_model, save_hugging_face, save_mamba_ssm

pytest.importorskip("transformers")


@pytest.fixture
def crsm(tmp_path, capsys, monkeypatch):
    """Runs the command in an empty folder beside the sources: exit status, standard output, standard error."""
    save_mamba_ssm(random_model(tie_word_embeddings=True), tmp_path / "sources" / "tied")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*args):
        capsys.readouterr()
        status = invoke(app, [str(arg) for arg in args])
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def test_a_folder_becomes_a_checkpoint_that_can_be_inspected_and_asked(crsm, tmp_path):
    status, out, err = crsm("import", "../sources/tied", "runs/tied", "--seed", "5", "--json", "-")
    assert status == 0, err
    results = json.loads(out)["results"]
    assert (results["source"], results["layout"], results["tensors"]) == ("tied", "mamba-ssm", 30)
    assert (results["tokens"], results["rows"], results["trainable"]) == (303, 304, True)
    assert err.startswith("tied: 30 tensors in the layout of mamba-ssm, ") and err.count("\n") == 1
    checkpoint = load_checkpoint("runs/tied")
    assert checkpoint.config.name == "tied" and checkpoint.config.seed == 5
    assert results["parameters"] == checkpoint.model.num_parameters()
    assert sorted(path.name for path in (tmp_path / "here" / "runs").iterdir()) == ["tied"]

    status, out, err = crsm("inspect", "runs/tied", "--json", "-")
    assert status == 0, err
    facts = json.loads(out)["results"]["facts"]
    assert facts["gates"] == "shut (never calibrated)" and facts["trust horizon"] == "not measured"

    ask = ("generate", "Question: how many?", "--checkpoint", "runs/tied", "--max-tokens", "9")
    alone, thought = crsm(*ask, "--planners", "0"), crsm(*ask)
    assert alone[0] == thought[0] == 0 and alone[1] == thought[1]
    assert "gates of this checkpoint are shut" in thought[2]


def test_a_tokenizer_lies_elsewhere_too(crsm, tmp_path):
    (tmp_path / "sources" / "tied" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
        status, _, err = crsm("import", "../sources/tied", f"from_{tokenizer.name}", "--tokenizer", tokenizer)
        assert status == 0, err
    status, _, err = crsm("import", "../sources/tied", "none")
    assert status == 2
    assert "no tokenizer.json; allowed: --tokenizer with a file, a folder" in err and err.count("\n") == 1


def test_without_rows_for_verdicts_it_says_what_that_means(crsm, tmp_path):
    save_hugging_face(random_model(vocab_size=300), tmp_path / "sources" / "full")
    status, _, err = crsm("import", "../sources/full", "full")
    assert status == 0, err
    assert "has 300 rows for 300 tokens" in err and "asked and measured, not trained" in err


def test_what_is_there_is_left_alone(crsm, tmp_path):
    (tmp_path / "here" / "mine").mkdir()
    status, _, err = crsm("import", "../sources/tied", "mine")
    assert (status, err) == (2, "error: DIR = 'mine' exists; allowed: a path where nothing is\n")
    (tmp_path / "here" / "broken").symlink_to("nowhere")
    assert crsm("import", "../sources/tied", "broken")[0] == 2
    assert list((tmp_path / "here" / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["../sources/none", "new"], "source = '../sources/none': no such folder; allowed: a folder with config.json"),
        (["../sources", "new"], "../sources: no config.json; allowed: a folder with config.json and weights"),
        (["../sources/tied", "new", "--tokenizer", "x.json"], "tokenizer = 'x.json': no such file; allowed: a token"),
        (["../sources/tied", "new", "--revision", "main"], "revision = 'main' of the folder '../sources/tied'; allow"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(crsm, tmp_path, args, expected):
    status, _, err = crsm("import", *args)
    assert status == 2 and expected in err and err.count("\n") == 1, err
    assert list((tmp_path / "here").iterdir()) == []


def test_a_source_that_is_cut_short_leaves_nothing(crsm, tmp_path):
    weights = tmp_path / "sources" / "tied" / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = crsm("import", "../sources/tied", "new")
    assert status == 2 and "pytorch_model.bin: " in err and err.count("\n") == 1, err
    assert list((tmp_path / "here").iterdir()) == []
