"""The speed benchmark: what it does with times, not what the times are."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crsm.mamba_ssm import Backbone
from jobs import benchmark_speed
from jobs.command import invoke
from jobs.speed import roofline as limits
from jobs.speed import train_speed
from jobs.speed.decoders import NotOfferedError, TorchDecoder
from jobs.speed.peers import llama_cpp, transformers
from jobs.speed.peers.llama_cpp import LlamaBench
from jobs.speed.peers.mctx import WORKER, weights_of
from jobs.speed.peers.process import PeerError, WorkerProcess
from jobs.speed.roofline import Roofline
from jobs.speed.rows import make_row, plain, print_rows
from jobs.speed.search_speed import network_cost, random_roots
from jobs.speed.shapes import NANO, PUBLIC_130M, SMALL, TINY, build
from jobs.speed.timing import interleave, median, percentile, rates, timed

# Timing --------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_warm_up_rounds_do_not_count():
    order = []

    def candidate(name, seconds):
        def run():
            order.append(name)
            return seconds * len(order)

        return run

    samples = interleave({"ours": candidate("ours", 1.0), "peer": candidate("peer", 10.0)}, repeats=2, warm_up=1)
    assert order == ["ours", "peer"] * 3
    assert samples == {"ours": [3.0, 5.0], "peer": [40.0, 60.0]}
    with pytest.raises(ValueError, match="repeats = 0; allowed: at least 1"):
        interleave({}, repeats=0)


def test_a_run_is_timed_by_the_clock_around_it():
    clock = iter([2.0, 2.25])
    called = []
    assert timed(lambda: called.append(1), clock=lambda: next(clock))() == 0.25
    assert called == [1]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50), st.sampled_from([0.01, 0.5, 0.95, 1.0]))
def test_the_percentile_is_the_smallest_sample_that_so_many_do_not_exceed(samples, share):
    found = percentile(samples, share)
    below = [value for value in samples if value <= found]
    assert found in samples
    assert len(below) >= share * len(samples) - 1e-9
    assert sum(value < found for value in samples) < share * len(samples)


# Rows ----------------------------------------------------------------------------------------------------------------


def test_a_row_holds_medians_their_ratio_and_the_share_of_the_limit():
    row = make_row(
        "decode", "tokens/s", 2, rates([0.5, 0.1, 0.25], 10), peer_name="llama.cpp", peer=[20.0, 5.0, 10.0], limit=80.0
    )
    assert (row.ours, row.peer, row.ratio, row.share_of_limit) == (40.0, 10.0, 4.0, 0.5)
    assert row.samples == {"ours": [20.0, 100.0, 40.0], "peer": [20.0, 5.0, 10.0]}


def test_of_times_the_lower_is_the_better_one():
    row = make_row("latency", "ms", 1, [2.0], peer_name="p", peer=[6.0], limit=0.5, higher_is_better=False)
    assert (row.ratio, row.share_of_limit) == (3.0, 0.25)


def test_without_a_peer_there_is_no_ratio_but_a_reason(capsys):
    row = make_row("search", "simulations/s", 2, [5.0], peer_name="mctx", note="without mctx: not installed", trees=3)
    values = plain(row)
    assert values == {
        "name": "search",
        "unit": "simulations/s",
        "threads": 2,
        "ours": 5.0,
        "peer_name": "mctx",
        "peer": None,
        "samples": {"ours": [5.0]},
        "note": "without mctx: not installed",
        "trees": 3,
    }
    print_rows("speed", [row])
    assert "without mctx: not installed" in capsys.readouterr().err


def test_a_row_of_the_peer_alone_says_what_ours_lacks():
    row = make_row("decode", "tokens/s", 2, (), peer_name="llama.cpp", peer=[7.0], limit=10.0, note="ours: no int8")
    assert (row.ours, row.peer, row.ratio, row.share_of_limit) == (None, 7.0, None, None)


# Limits --------------------------------------------------------------------------------------------------------------


def test_the_limit_of_a_network_is_its_products_or_the_reading_of_its_weights(monkeypatch):
    monkeypatch.setattr(limits, "measure_read", lambda size, device, seconds: 7.0)
    roofline = Roofline(threads=2, gemm_gflops=100.0, read={10**6: 20.0})
    # 20 GB/s read 1 MB 20,000 times a second; 100 GFLOP/s do 1 M multiply-adds 50,000 times.
    assert roofline.products_per_second(1e6, 1e6) == pytest.approx(20_000)
    assert roofline.products_per_second(1e6, 1e6, batch=2) == pytest.approx(40_000)
    assert roofline.products_per_second(1e6, 1e6, batch=64) == pytest.approx(50_000)


def test_a_limit_is_the_best_that_was_measured(monkeypatch):
    rates_seen = iter([5.0, 9.0, 4.0])
    monkeypatch.setattr(limits, "measure_read", lambda size, device, seconds: next(rates_seen))
    roofline = Roofline(threads=1, quick=True)
    assert [roofline.read_gbs_of(10**6) for _ in range(3)] == [5.0, 9.0, 9.0]
    products = iter([{"torch": 50.0, "native": 60.0}, {"torch": 70.0, "native": 20.0}])
    monkeypatch.setattr(limits, "measure_gemm", lambda size, device, seconds: next(products))
    roofline.measure_gemm()
    roofline.measure_gemm()
    assert (roofline.gemm, roofline.gemm_gflops) == ({"torch": 70.0, "native": 60.0}, 70.0)


def test_the_limit_of_training_is_six_operations_per_parameter_and_token():
    assert train_speed.tokens_per_second_at(gflops=120.0, parameters=10**7) == 2000.0


@pytest.mark.parametrize("shape", [SMALL, NANO, TINY, PUBLIC_130M])
def test_parameters_are_counted_with_the_embedding_once(shape):
    with torch.device("meta"):
        backbone = Backbone(shape.config())
    assert shape.parameters == sum(parameter.numel() for parameter in backbone.parameters())


def test_the_cost_of_a_simulation_is_that_of_its_matrices_and_memory_reads():
    model = build(TINY, 0, width=16)
    d, inner, layers, n, g, v, dec = 16, 32, 2, 8, 16, 24, 256
    matrices = (g + d) * layers * n + layers * inner * g + 3 * g * (d + g) + 3 * g * g
    matrices += g * layers * d + g * dec + dec * layers * d + d * v
    assert network_cost(model) == (matrices + layers * inner * n, 4 * matrices)


# Peers ---------------------------------------------------------------------------------------------------------------


def test_both_sides_train_on_the_same_loss():
    """Same weights, same tokens: the losses agree, and a step of each lowers its own."""
    pytest.importorskip("transformers")
    theirs = transformers.build(TINY, 3)
    ours = build(TINY, 3, planners=False)
    weights = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=False)
    ours.fusion.use_last_layer()
    tokens_BT = train_speed.random_tokens(train_speed.Case(TINY, 3, 11), 0)
    before = train_speed.our_loss(ours, tokens_BT).item()
    assert transformers.loss(theirs, tokens_BT).item() == pytest.approx(before, abs=1e-4)
    step = train_speed.training_step(train_speed.trainable(ours), lambda: train_speed.our_loss(ours, tokens_BT))
    for _ in range(5):
        step()
    assert train_speed.our_loss(ours, tokens_BT).item() < before


def test_both_sides_decode_the_same_tokens():
    pytest.importorskip("transformers")
    peer_model = transformers.build(TINY, 3)
    for parameter in peer_model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = build(TINY, 3, planners=False)
    weights = {name.replace("embeddings", "embedding"): tensor for name, tensor in peer_model.state_dict().items()}
    model.load_state_dict(weights, strict=False)
    model.fusion.use_last_layer()
    prompt_BT = torch.arange(10).reshape(2, 5)
    decoded = []
    for decoder in (TorchDecoder(model, "fp32"), transformers.Decoder(peer_model)):
        token_B, state = decoder.prefill(prompt_BT)
        decoded.append([token_B.tolist(), *(token.tolist() for token in decoder.decode(token_B, state, 6))])
    assert decoded[0] == decoded[1]


def test_our_decoder_leaves_the_state_that_it_starts_from():
    decoder = TorchDecoder(build(TINY, 1, planners=False), "fp32")
    token_B, state = decoder.prefill(torch.tensor([[1, 2, 3]]))
    assert [t.tolist() for t in decoder.decode(token_B, state, 4)] == [
        t.tolist() for t in decoder.decode(token_B, state, 4)
    ]
    with pytest.raises(NotOfferedError, match="int8"):
        TorchDecoder(build(TINY, 1, planners=False), "int8")


def test_what_llama_bench_prints_is_read_or_refused():
    assert llama_cpp.parse('[{"n_gen": 4, "avg_ts": 39.4}]') == 39.4
    for wrong in ("", "[]", "{}", '[{"avg_ts": 1}, {"avg_ts": 2}]', '[{"n_gen": 4}]'):
        with pytest.raises(PeerError, match="llama-bench printed something else"):
            llama_cpp.parse(wrong)


def test_llama_bench_is_called_with_our_threads_and_its_failure_is_its_last_line(tmp_path):
    program = tmp_path / "llama-bench"
    program.write_text('#!/bin/sh\necho "$@" > "$0.called"\necho \'[{"avg_ts": 50.0}]\'\n')
    program.chmod(0o755)
    bench = LlamaBench(program, tmp_path, threads=2)
    with pytest.raises(PeerError, match=r"130m-q8_0.gguf is missing; `make llama-bench`"):
        bench.decode("130m", "int8", 10)
    (tmp_path / "130m-q8_0.gguf").touch()
    assert bench.decode("130m", "int8", 10) == 0.2
    assert (tmp_path / "llama-bench.called").read_text().split()[2:] == "-t 2 -r 1 -o json -p 0 -n 10".split()
    assert bench.prefill("130m", "int8", 100) == 2.0
    program.write_text('#!/bin/sh\necho "loading" >&2\necho "cannot load" >&2\nexit 3\n')
    with pytest.raises(PeerError, match=r"cannot load$"):
        bench.decode("130m", "int8", 10)


def worker(tmp_path, body):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(body))
    return WorkerProcess(sys.executable, script, threads=1)


def test_a_worker_answers_line_by_line_and_its_errors_are_the_peers(tmp_path):
    body = """
        import json, sys
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "die":
                sys.exit("out of memory")
            print(json.dumps({"error": "no"} if question["do"] == "fail" else {"twice": 2 * question["x"]}), flush=True)
    """
    with worker(tmp_path, body) as process:
        assert process.ask(do="double", x=4) == {"twice": 8}
        with pytest.raises(PeerError, match=r"^no$"):
            process.ask(do="fail")
        with pytest.raises(PeerError, match="the peer's process ended: out of memory"):
            process.ask(do="die")


def test_an_interpreter_that_is_not_there_is_a_missing_peer(tmp_path):
    with pytest.raises(PeerError, match="No such file"):
        WorkerProcess(str(tmp_path / "python"), WORKER, threads=1)


def test_a_worker_without_mctx_says_so(tmp_path):
    np.savez(tmp_path / "weights.npz", x=np.zeros(1))
    script = tmp_path / "mctx_worker.py"  # with modules that fail in the place of missing ones
    text = WORKER.read_text(encoding="utf-8")
    script.write_text(text.replace("if __name__", "sys.modules['mctx'] = sys.modules['jax'] = None\nif __name__"))
    with (
        WorkerProcess(sys.executable, script, threads=1) as process,
        pytest.raises(PeerError, match=r"not installed for .*python"),
    ):
        process.ask(do="load", weights=str(tmp_path / "weights.npz"))


def test_the_network_that_mctx_gets_is_ours():
    """The same network in numpy, on the arrays that the worker gets, as the worker computes it."""
    jax = pytest.importorskip("jax", reason="needs jax (the extra `bench`)")
    del jax
    from jobs.speed.peers import mctx_worker

    model = build(TINY, 0, width=16)
    snapshot, token_B = random_roots(model, 3, 0)
    w = weights_of(model)
    g = mctx_worker.begin(w, snapshot.hidden_BLD.numpy())
    _, logits_BV, value_B = mctx_worker.step(w, snapshot.memory_BMHPN.numpy(), g, token_B)
    with torch.inference_mode():
        _, hidden_BLD = model.world_model.advance(
            model.world_model.begin(snapshot), snapshot, torch.from_numpy(token_B)
        )
        np.testing.assert_allclose(logits_BV, model.logits(hidden_BLD), atol=1e-4)
        np.testing.assert_allclose(value_B, model.critic.consensus(model.critic(hidden_BLD)), atol=1e-5)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(capsys):
    def call(*args):
        status = invoke(benchmark_speed.app, [*map(str, args)])
        found = capsys.readouterr()
        return status, json.loads(found.out) if found.out else None, found.err

    return call


def check_rows(record, peers):
    """What every row must hold, and that its figures follow from its samples."""
    results = record["results"]
    assert results["threads"] == 1
    assert results["roofline"]["gemm_gflops"] > 0
    assert results["roofline"]["read_gbs"] > 0
    for row in results["rows"]:
        assert {"name", "ours", "peer", "unit", "samples", "threads"} <= set(row)
        assert row.get("peer_name") in peers
        for side in ("ours", "peer"):
            samples = row["samples"].get(side, [])
            assert row[side] == pytest.approx(median(samples)) if samples else row[side] is None
        assert ("ratio" in row) == (row["ours"] is not None and row["peer"] is not None)
        if "ratio" in row:
            assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        if row["peer"] is None and row.get("peer_name"):
            assert f"without {row['peer_name']}: " in row["note"]
        assert ("share_of_limit" in row) <= ("limit" in row)
        assert all(math.isfinite(value) for values in row["samples"].values() for value in values)


def test_search_runs_without_its_peer(job, tmp_path):
    options = ("--quick", "--threads", 1, "--peer-python", tmp_path / "no-python", "--json", "-")
    status, record, err = job("search", *options)
    assert status == 0
    assert record["job"] == "benchmark_speed search"
    check_rows(record, {"mctx", "PyTorch, a state a node", None})
    first, _, latency, *_, exact = record["results"]["rows"]
    assert exact["peer_name"] == "PyTorch, a state a node" and exact["ratio"] > 0
    assert first["samples"]["ours"] and first["unit"] == "simulations/s"
    assert latency["unit"] == "ms" and latency["percentile_95"] >= latency["ours"]
    assert latency["share_of_limit"] == pytest.approx(latency["limit"] / latency["ours"])
    assert "TINY SHAPES" in err and "without mctx" in err


def test_train_stands_beside_transformers(job):
    pytest.importorskip("transformers")
    status, record, err = job("train", "--quick", "--device", "cpu", "--threads", 1, "--json", "-")
    assert status == 0
    check_rows(record, {"transformers", None})
    beside, alone = record["results"]["rows"]
    assert beside["peer_chunk_size"] in (32, 64, 128, 256)
    assert len(beside["samples"]["ours"]) == len(beside["samples"]["peer"]) == 5
    assert beside["parameters"] == TINY.parameters
    assert "peer_name" not in alone
    assert "limit by matrix products" in err


def test_decode_goes_on_without_llama_cpp(job, tmp_path):
    pytest.importorskip("transformers")
    options = ("--quick", "--device", "cpu", "--threads", 1, "--gguf-dir", tmp_path, "--json", "-")
    status, record, _ = job("decode", *options)
    assert status == 0
    check_rows(record, {"transformers", "llama.cpp", None})
    rows = record["results"]["rows"]
    assert sum(row.get("peer_name") == "llama.cpp" and row["peer"] is None for row in rows) == 4
    assert [row["over_one_stream"] > 0 for row in rows if "over_one_stream" in row] == [True, True]


def test_both_systems_are_measured_on_one_device(job):
    status, record, err = job("device", "--quick", "--device", "cpu", "--threads", 1, "--json", "-")
    assert status == 0
    check_rows(record, {"System 2 off", None})
    rows = record["results"]["rows"]
    assert [row["bar"] for row in rows if row.get("bar")] == [100_000, 0.95, 0.95]
    assert [row["leaves"] for row in rows if "leaves" in row] == [1, 2]
    assert all(row["requests"] > 0 for row in rows if row.get("peer_name") == "System 2 off")
    assert "the bar is 100,000" in err


def test_a_profile_names_the_operators_and_their_shares(job):
    status, record, err = job("profile", "--quick", "--json", "-")
    assert status == 0
    steps = [one for one in record["results"]["profiles"] if one["work"].startswith("training step")]
    assert steps[0]["by"] == "reference"
    for one in steps:
        assert one["milliseconds"] > 0
        assert 0 < sum(one["shares"].values()) <= 1
        assert list(one["shares"].values()) == sorted(one["shares"].values(), reverse=True)
    assert "where the time goes" in err


def test_a_missing_library_is_a_note_in_the_row(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, record, _ = job("train", "--quick", "--device", "cpu", "--threads", 1, "--json", "-")
    assert status == 0
    (row, _) = record["results"]["rows"]
    assert row["peer"] is None and "ratio" not in row
    assert row["note"].startswith("without transformers: not installed")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train", "--device", "tpu"], "device = 'tpu'; allowed: auto, cpu, cuda"),
        (["search", "--threads", "-1"], "'--threads'"),
        (["search", "--set", "search.simulations=0"], "simulations"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_a_mistake_is_one_line(job, args, expected):
    status, record, err = job(*args)
    assert (status, record) == (2, None)
    assert err.count("\n") == 1 and expected in err, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(job):
    status, _, err = job("decode", "--device", "cuda")
    assert status == 2 and "this machine has none" in err
    assert benchmark_speed.pick_device("auto") == "cpu"


def test_help_needs_neither_torch_nor_ray():
    code = "import sys, jobs.benchmark_speed; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
