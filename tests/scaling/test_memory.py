"""Bytes of a step: sums made by hand, and what real steps of stage 1 hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm import native
from crsm.config import BackboneConfig, ModelConfig, WorldModelConfig, WriterConfig, load_config, parse_config
from crsm.scaling.devices import parse_devices
from crsm.scaling.memory import (
    ACTIVATIONS,
    AVERAGE,
    BUCKETS,
    COPIES,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Layout,
    Ledger,
    native_chunks,
    steady_bytes,
    step_ledger,
)
from crsm.scaling.parameters import count_parameters, trained_parameters
from crsm.scaling.plan import make_plan
from crsm.scaling.rows import RowGroup

SMALL = ModelConfig(
    backbone=BackboneConfig(vocab_size=1000, d_model=8, n_layer=2, d_state=4, headdim=8, chunk_size=16),
    world_model=WorldModelConfig(width=4, decoder_width=4),
    writer=WriterConfig(width=4),
)
"""D = 8, E = 16, H = 2, C = 24, I = 42, L = 2, V = 1000."""
TEXT = RowGroup("text", rows=3, length=32, targets=93, values=0, packed=True)
JUDGED = RowGroup("task", rows=2, length=20, targets=12, values=10, packed=False)
FP32 = Layout("native")
BF16 = Layout("cuda", bf16=True)


def test_a_ledger_keeps_the_most_that_was_held_and_when():
    ledger = Ledger()
    ledger.enter("first")
    ledger.hold("a", 10)
    ledger.enter("second")
    with ledger.briefly("b", 5):
        ledger.drop("a", 4)
    ledger.enter("third")
    ledger.hold("b", 8)
    assert (ledger.peak, ledger.moment, ledger.at_peak) == (15, "second", {"a": 10, "b": 5})
    assert ledger.held == {"a": 6, "b": 8}
    with pytest.raises(AssertionError, match="c was never held"):
        ledger.drop("c", 1)


def test_weights_gradients_and_moments_are_four_bytes_each():
    total, trained = sum(count_parameters(SMALL).values()), trained_parameters(SMALL)
    nothing = {AVERAGE: 0, BUCKETS: 0}
    assert steady_bytes(SMALL, FP32) == {
        WEIGHTS: 4 * total,
        GRADIENTS: 4 * trained,
        OPTIMIZER: 8 * trained,
        **nothing,
    }
    several = steady_bytes(SMALL, replace(FP32, workers=4, ema=True))
    assert (several[BUCKETS], several[AVERAGE], several[WEIGHTS]) == (4 * trained, 4 * trained, 4 * total)


def test_shards_are_of_what_is_trained_and_frozen_weights_are_whole():
    total, trained = sum(count_parameters(SMALL).values()), trained_parameters(SMALL)
    share = -(-trained // 4)
    once = Layout("cuda", sharded=True, workers=4)
    assert steady_bytes(SMALL, once) == {
        WEIGHTS: 4 * (total - trained + share),
        GRADIENTS: 4 * share,
        OPTIMIZER: 8 * share,
        AVERAGE: 0,
        BUCKETS: 0,
    }
    # Summed over micro-batches before they are divided.
    assert steady_bytes(SMALL, replace(once, accumulated=True))[GRADIENTS] == 4 * trained


def test_the_peak_of_a_small_model_is_the_sum_made_by_hand():
    """At the backward pass of the head: everything is saved, and there are three logits for every target."""
    ledger = step_ledger(SMALL, (TEXT,), FP32)
    positions = 3 * 32
    stream = positions * 8
    # A layer: its input; normed input, projection, convolved x, B and C, scan, normed output; states of 2 chunks.
    layer = stream + positions * (8 + 42 + 24 + 16 + 16) + 3 * 2 * 16 * 4
    zeros = 3 * (16 * 4 + 24 * 3)
    head = 93 * 8 + 93 * 8  # mixed, and normed
    assert ledger.moment == "text, backward of the head"
    assert ledger.at_peak == {
        WEIGHTS: 4 * sum(count_parameters(SMALL).values()),
        OPTIMIZER: 8 * trained_parameters(SMALL),
        "saved by layers": 4 * (zeros + 2 * layer),
        "residual streams": 4 * 93 * 2 * 8,
        "logits": 4 * (head + 3 * 93 * 1000),
        **{kind: 0 for kind in ledger.at_peak if not ledger.at_peak[kind]},
    }
    assert ledger.peak == sum(ledger.at_peak.values())


def test_everything_is_dropped_again_but_weights_gradients_and_moments():
    for layout in (FP32, replace(FP32, checkpoint=True), BF16, Layout("cuda", bf16=True, sharded=True, workers=4)):
        ledger = step_ledger(SMALL, (TEXT, JUDGED), layout)
        assert all(ledger.held[kind] == 0 for kind in ACTIVATIONS), layout
        gathered = ledger.held[COPIES]
        assert gathered == 0 or layout.sharded
        assert ledger.held[GRADIENTS] == pytest.approx(steady_bytes(SMALL, layout)[GRADIENTS], abs=400)


def test_checkpointing_keeps_one_layer_instead_of_all():
    deep = SMALL.model_copy(update={"backbone": SMALL.backbone.model_copy(update={"n_layer": 40, "vocab_size": 16})})
    kept, again = (step_ledger(deep, (TEXT,), replace(FP32, checkpoint=on)) for on in (False, True))
    positions = 3 * 32
    saved = 4 * (positions * (8 + 42 + 24 + 16 + 16) + 3 * 2 * 16 * 4)
    most = max(kept.at_peak["saved by layers"], 1)
    assert most == 4 * 3 * (16 * 4 + 24 * 3) + 40 * (saved + 4 * positions * 8)
    assert again.at_peak["saved by layers"] <= most - 39 * saved
    assert again.peak < kept.peak


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    length=st.integers(2, 70),
    checkpoint=st.booleans(),
    bf16=st.booleans(),
    accumulated=st.booleans(),
    workers=st.sampled_from([1, 2, 8]),
    sharded=st.booleans(),
)
def test_more_rows_never_need_less(rows, length, checkpoint, bf16, accumulated, workers, sharded):
    layout = Layout("cuda" if bf16 else "native", bf16, checkpoint, sharded, workers, accumulated)

    def peak(count: int) -> int:
        return step_ledger(SMALL, (RowGroup("text", count, length, count * (length - 1), 0, True),), layout).peak

    assert peak(rows) <= peak(rows + 1)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 700), chunk=st.integers(1, 300))
def test_chunks_are_cut_as_the_native_core_cuts_them(length, chunk):
    if not native.available():
        pytest.skip("no native core")
    assert native_chunks(length, chunk) == native.require().scan_chunks(length, chunk)


# ------------------------------------------------------------------------------------------------------- measured

TASKS = """[{name: path_star, arms: 3, length: 4, labels: 30}, {name: tree_path, depth: 3, labels: 30}]"""
MEASURED = {
    "tasks": "stage_1: {batch: 16}",
    "text": "stage_1: {batch: 2, text: {shards: none, share: 1.0}}",
}


@pytest.mark.parametrize("kind", MEASURED)
def test_a_plan_is_within_a_tenth_of_what_a_step_holds(kind):
    if not native.available():
        pytest.skip("no native core")
    import yaml

    from jobs.verification.plan_memory import build, count_tensors, cut_to, with_rows

    vocabulary = 0 if kind == "tasks" else 3000
    text = f"""
model:
  backbone: {{d_model: 64, n_layer: 3, d_state: 32, headdim: 32, vocab_size: {vocabulary}}}
  world_model: {{width: 16, decoder_width: 32}}
  writer: {{width: 16}}
tasks: {TASKS}
{MEASURED[kind]}
"""
    config = parse_config(yaml.safe_load(text), "test")
    plan = cut_to(with_rows(config, rows=2, length=128), limit=1.0)
    stage, batches = build(plan, {"rows": 2, "length": 128})
    measured = count_tensors(stage, batches)["tensors"]
    assert plan.memory.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_plan_of_full_size_is_within_a_tenth_of_a_pass_on_the_meta_device(checkpoint):
    """The whole of 1b and rows of full length, in the real code, with sizes only."""
    if not native.available():
        pytest.skip("no native core")
    from jobs.verification.on_meta import count_on_meta
    from jobs.verification.plan_memory import with_rows

    config = load_config(Path(__file__).parents[2] / "configs/1b.yaml")
    train = config.train.model_copy(update={"checkpoint_activations": checkpoint})
    config = with_rows(config.model_copy(update={"train": train}), rows=8, length=2048)
    plan = make_plan(config, *parse_devices("1xcpu:100000GB"))
    held = count_on_meta(plan.config, rows=8, length=2048) + plan.steady[OPTIMIZER]
    assert plan.memory.peak == pytest.approx(held, rel=0.1)
    # The activations alone, too.
    steady = plan.memory.peak - plan.memory.activations
    assert plan.memory.activations == pytest.approx(held - steady, rel=0.1)
