"""What the settings ask of a run's machine: compiled layers, or a line that says why not."""

import pytest
import torch

from crsm.config import TrainConfig
from crsm.training.execution import finished_model, prepare
from crsm.training.loop import LoopState, run_stage

CPU = torch.device("cpu")


def test_without_a_compiler_compiled_layers_are_refused_in_one_line(make_stage, monkeypatch):
    def broken(function):
        def call(*_):
            raise RuntimeError("\nInvalidCxxCompiler: no g++\nTraceback")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    message = r"^train.compile = True: .*: InvalidCxxCompiler: no g\+\+; allowed: False, or a C\+\+ compiler.*GPU$"
    with pytest.raises(ValueError, match=message):
        prepare(make_stage("stage_1"), TrainConfig(compile=True), world=1, device=CPU)


def test_one_shard_is_the_whole(make_stage):
    stage = make_stage("stage_1")
    assert prepare(stage, TrainConfig(strategy="fsdp"), world=1, device=CPU) is stage
    assert finished_model(stage, 0) is stage.model and finished_model(stage, 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_compiled_layers_train_as_others_do(make_stage, monkeypatch, kernels):
    monkeypatch.setenv("CRSM_KERNELS", kernels)
    curves = []
    for settings in (TrainConfig(), TrainConfig(compile=True), TrainConfig(compile=True, checkpoint_activations=True)):
        stage = make_stage("stage_1", "stage_1.steps=4")
        module = prepare(stage, settings, world=1, device=CPU)
        result = run_stage(stage, module=module)
        model = finished_model(stage, 0)
        assert model is not None and not model.backbone.recompute
        assert all(layer._compiled_call_impl is None for layer in model.backbone.layers)
        curves.append([point["loss"] for point in result.curve if "loss" in point])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_bf16_trains_and_goes_on_from_its_state(make_stage, tmp_path, compiled):
    settings = TrainConfig(precision="bf16", checkpoint_activations=True, compile=compiled)
    sizes = ("model.backbone.d_state=16", "stage_1.steps=6", "stage_1.checkpoint_every=3")

    def run(resume=None):
        stage = make_stage("stage_1", *sizes)
        module = prepare(stage, settings, world=1, device=torch.device("cuda"))
        save = lambda state: state.save(tmp_path / str(state.step))  # noqa: E731
        result = run_stage(stage, module=module, resume=resume, on_checkpoint=save)
        return [point["loss"] for point in result.curve if "loss" in point]

    whole = run()
    assert run(LoopState.load(tmp_path / "3", "stage_1")) == pytest.approx(whole, rel=1e-3)
