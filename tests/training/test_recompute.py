"""Activations that are computed again: the same gradients from less memory."""

from datetime import timedelta

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from crsm.kernels import native
from crsm.training.execution import run_connected
from crsm.training.precision import autocast

CPU = torch.device("cpu")
DEEP = ("model.backbone.n_layer=6", "stage_1.batch=16")


def gradients(stage, module=None, precision="fp32"):
    """Gradients by name, and the bytes that are kept between forward and backward, each tensor's memory once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(precision, CPU):
            loss, _ = (module or stage)(stage.batch(0, 0, 0, 1))
        size = sum(kept.values())
        loss.backward()
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}, size


def assert_same(left, right):
    assert left.keys() == right.keys() and left
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_gradients_are_the_same_bits_and_what_is_kept_of_a_layer_is_its_input(
    make_stage, monkeypatch, kernels, precision
):
    if kernels == "native" and not native.available():
        pytest.skip("no native core")
    monkeypatch.setenv("CRSM_KERNELS", kernels)
    stage = make_stage("stage_1", *DEEP)
    wanted, everything = gradients(stage, precision=precision)
    stage.zero_grad(set_to_none=True)
    stage.model.backbone.recompute = True
    found, kept = gradients(stage, precision=precision)
    assert_same(found, wanted)
    # A layer keeps its input of d_model; without this at least its projection too, of over 4 · d_model.
    assert kept < 0.5 * everything


def test_a_write_into_the_state_has_the_same_gradients(make_stage):
    stage = make_stage("stage_4")
    wanted, _ = gradients(stage)
    stage.zero_grad(set_to_none=True)
    stage.model.backbone.recompute = True
    assert_same(gradients(stage)[0], wanted)


def test_it_works_below_ddp_with_parts_that_a_batch_does_not_use(make_stage, tmp_path):
    stage = make_stage("stage_1", *DEEP)
    wanted, _ = gradients(stage)
    stage.zero_grad(set_to_none=True)
    stage.model.backbone.recompute = True

    def compare():
        module = DistributedDataParallel(stage, find_unused_parameters=True)
        assert_same(gradients(stage, module)[0], wanted)
        batch = stage.batch(0, 0, 0, 1)
        for part in batch:
            part.value_mask_BT[:] = False  # no judged row: no critic
        stage.zero_grad(set_to_none=True)
        module(batch)[0].backward()

    run_connected(compare, rank=0, world=1, store=tmp_path / "store", patience=timedelta(seconds=60))
    assert stage.model.critic.weight_LD.grad is None
    assert stage.model.backbone.embedding.weight.grad is not None
