"""Training beside a peer: who trains when, what is measured, and what is said of a peer that is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crsm.scaling.arithmetic import token_cost
from jobs import benchmark_training
from jobs.command import invoke
from jobs.speed.training_pair import Found, in_turns, peak_of, plain, row_of
from tests.jobs.test_train_alone import CPU, config, overrides

__all__ = ["config", "overrides"]


def test_one_runs_at_a_time_and_who_has_ended_is_passed_over() -> None:
    done: list[str] = []

    def work(name: str, blocks: int):  # type: ignore[no-untyped-def]
        def run(pass_on) -> None:  # type: ignore[no-untyped-def]
            for number in range(blocks):
                done.append(f"{name}{number}")
                pass_on()

        return run

    in_turns({"a": work("a", 3), "b": work("b", 1), "c": work("c", 2)})
    assert done == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_a_failure_of_one_is_raised_when_all_have_ended() -> None:
    done: list[int] = []

    def fails(pass_on) -> None:  # type: ignore[no-untyped-def]
        pass_on()
        raise FloatingPointError("loss is nan")

    def goes_on(pass_on) -> None:  # type: ignore[no-untyped-def]
        for number in range(3):
            done.append(number)
            pass_on()

    with pytest.raises(FloatingPointError, match="loss is nan"):
        in_turns({"one": fails, "other": goes_on})
    assert done == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "want"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("a CPU", None)],
)
def test_the_peak_is_that_of_the_data_sheet(name: str, want: float | None) -> None:
    assert peak_of(name, "bf16") == want


def test_utilisation_is_the_median_rate_times_the_operations_of_a_token(config) -> None:  # type: ignore[no-untyped-def]
    points = [{"step": 1.0 * step, "loss": 3.0, "tokens_per_second": rate} for step, rate in ((1, 1), (2, 40), (3, 60))]
    found = Found("none", "NVIDIA H200", 1.0, {"ours": 5}, {"ours": points}, 2e9, 1e12, 5e11)
    row = row_of(found, config, CPU)
    assert (row.ours, row.limit, row.share_of_limit) == (50.0, 500.0, 0.1)
    assert plain(found, row)["mfu"] == {"ours": {"of_data_sheet": 0.1, "of_matrix_product": 0.2}}


@pytest.mark.parametrize("peer", ["mamba2", "mamba_ssm", "none"])
def test_both_train_on_the_same_rows(overrides: list[str], peer: str, tmp_path: Path) -> None:
    if peer == "mamba2":
        pytest.importorskip("transformers")
    arguments = [word for override in overrides for word in ("--set", override)]
    arguments += ["--peer", peer, "--steps", "4", "--block", "1", "--device", "cpu", "--json", str(tmp_path / "r.json")]
    assert invoke(benchmark_training.main, arguments) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    curves = results["curves"]
    assert set(curves) == ({"ours", "peer"} if peer == "mamba2" else {"ours"})
    assert all([point["step"] for point in curve] == [1, 2, 3, 4] for curve in curves.values())
    assert ("without mamba_ssm: it is not installed" in results["row"].get("note", "")) == (peer == "mamba_ssm")
    assert results["flops_per_token"] > 0 and results["mfu"]["ours"]["of_matrix_product"] > 0


def test_an_unknown_peer_is_refused(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(benchmark_training.main, ["--peer", "rwkv"]) == 2
    assert "peer = 'rwkv'; allowed: mamba2, gpt2, mamba_ssm, none" in capsys.readouterr().err


def test_a_token_of_the_170m_model_costs_about_six_operations_a_parameter() -> None:
    from crsm.config import load_config

    sizes = load_config("configs/baseline_170m.yaml", []).model.backbone
    assert token_cost(sizes, 256).train_flops() == pytest.approx(6 * 129e6, rel=0.25)
