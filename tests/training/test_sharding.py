"""Sharded weights: what is saved is whole, what a worker does not use counts as zero, and shards are small."""

import traceback
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from crsm.config import TrainConfig, load_config
from crsm.data.tokenizer import build_tokenizer
from crsm.model import build_model
from crsm.tasks import build_tasks
from crsm.training.backbone import BackboneStage
from crsm.training.execution import finished_model, prepare, run_connected
from crsm.training.loop import LoopState, run_stage
from crsm.training.optimizer import build_optimizer, clip_gradients
from crsm.training.sharding import bytes_of, clip_shards, gather, synchronised

CPU = torch.device("cpu")
WORLD = 2
OVERRIDES = [
    "model.backbone={d_model: 32, n_layer: 3, d_state: 8, headdim: 16, chunk_size: 16, tie_embeddings: true}",
    "model.world_model={width: 16, decoder_width: 16}",
    "model.writer.width=16",
    "tasks=[{name: path_star, arms: 2, length: 3, labels: 12}, {name: tree_path, depth: 2, labels: 12, weight: 0.2}]",
    "stage_1={steps: 4, batch: 10, log_every: 1, evaluate_problems: 8, evaluate_every: 2}",
    "stage_1.optimizer={warmup: 2, schedule: constant, accumulate: 2, ema: 0.9}",
]


def make_stage():
    config = load_config(None, OVERRIDES)
    tasks = build_tasks(config.tasks)
    tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
    torch.manual_seed(config.seed)
    return BackboneStage(build_model(config, tokenizer), config.stage_1, config.seed, tasks, tokenizer)


def sharded_stage(**settings):
    stage = make_stage()
    prepare(stage, TrainConfig(strategy="fsdp", **settings), world=WORLD, device=CPU)
    return stage


def mean_of_workers(plain, step, micros=1):
    """Gradients of one process over the parts of all workers, as data-parallel training averages them."""
    plain.world = WORLD
    for micro in range(micros):
        for rank in range(WORLD):
            (plain(plain.batch(step, micro, rank, WORLD))[0] / WORLD / micros).backward()


def check_gradients(rank):
    plain, stage = make_stage(), sharded_stage()
    stage.world = WORLD
    assert all(isinstance(p, DTensor) == p.requires_grad for p in stage.parameters())
    # One of the two has no row of the second task: it takes part with a blank one.
    rows = [len(stage.batch(0, 0, worker, WORLD)) for worker in range(WORLD)]
    assert rows == [2, 2] and sorted(len(plain.batch(0, 0, worker, WORLD)) for worker in range(WORLD)) == [1, 2]
    for micro in (0, 1):
        with synchronised(stage, micro == 1):
            (stage(stage.batch(0, micro, rank, WORLD))[0] / 2).backward()
    mean_of_workers(plain, 0, micros=2)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad.full_tensor() for name, p in stage.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name
    # The same norm, and the same scale.
    norm = clip_gradients([p for p in plain.parameters() if p.grad is not None], 0.1)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    assert float(clip_shards(parameters, 0.1)) == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad.full_tensor(), wanted[name], atol=1e-6), name


def check_unused(rank):
    stage = sharded_stage()
    stage.world = WORLD
    parts = stage.batch(0, 0, rank, WORLD)
    if rank == 1:
        for part in parts:
            part.value_mask_BT[:] = False
    stage(parts)[0].backward()
    critics = list(stage.model.critic.parameters())
    trained = [p for p in stage.parameters() if p.requires_grad]
    clip_shards(trained, 1.0)
    assert all(p.grad is not None for p in critics)  # the other worker has used them
    stage.zero_grad(set_to_none=True)
    for part in parts:
        part.value_mask_BT[:] = False
    stage(parts)[0].backward()
    clip_shards(trained, 1.0)
    assert all(p.grad is None for p in critics)
    assert stage.model.backbone.embedding.weight.grad is not None


def check_optimizer_and_memory(rank):
    plain, stage = make_stage(), sharded_stage()
    groups = [build_optimizer(s, s.settings.optimizer).param_groups for s in (plain, stage)]
    names = []
    for own, found in zip((plain, stage), groups, strict=True):
        of = {id(p): name for name, p in own.named_parameters()}
        names.append([[of[id(p)] for p in group["params"]] for group in found])
    assert names[0] == names[1]  # shards of what is not decayed are not decayed
    trained = [[p for p in s.parameters() if p.requires_grad] for s in (plain, stage)]
    whole, own = map(bytes_of, trained)
    assert 0.45 * whole <= own <= 0.55 * whole  # rows that do not divide go to the first worker
    assert sum(isinstance(m, FSDPModule) for m in stage.modules()) == 1 + 3  # the stage and its layers


def check_whole_run(rank, folder):
    stage = sharded_stage(checkpoint_activations=True)
    evaluations, states = [], []
    result = run_stage(
        stage, rank=rank, world=WORLD, module=stage, on_evaluate=evaluations.append, on_checkpoint=states.append
    )
    model = finished_model(stage, rank)
    assert (model is None) == (rank != 0)
    assert len(evaluations) == (2 if rank == 0 else 0) and bool(states[-1].tensors) == (rank == 0)
    if rank == 0:
        states[-1].save(f"{folder}/state")
        torch.save([model.state_dict(), result.curve], f"{folder}/model")
        assert model.lm_head.weight is model.backbone.embedding.weight


def check_bf16(rank):
    stage = sharded_stage(precision="bf16", checkpoint_activations=True)
    stage.world = WORLD
    seen = []
    layer = stage.model.backbone.layers[0]
    layer.mixer.out_proj.register_forward_pre_hook(
        lambda module, _: seen.append((module.weight.dtype, layer.mixer.A_log.dtype, layer.norm.weight.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage(stage.batch(0, 0, rank, WORLD))[0]
    loss.backward()
    assert seen and set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    plain = make_stage()
    plain.world = WORLD
    for worker in range(WORLD):
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain(plain.batch(0, 0, worker, WORLD))[0]
        (loss / WORLD).backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            whole, exact = parameter.grad.full_tensor(), wanted[name].grad
            assert (whole - exact).norm() <= 0.02 * exact.norm() + 1e-6, name


def check_gather(rank):
    stage = sharded_stage()
    wanted = dict(make_stage().named_parameters())
    found = gather(dict(stage.named_parameters()), keep=rank == 1)
    assert (found == {}) if rank == 0 else found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def work(rank, folder):
    torch.set_num_threads(1)
    run_connected(
        lambda: check_all(rank, folder),
        rank=rank,
        world=WORLD,
        store=f"{folder}/store",
        patience=timedelta(seconds=120),
    )


def check_all(rank, folder):
    """In the same two processes: starting them takes longer than the checks."""
    failed = {}
    for check in (check_gather, check_optimizer_and_memory, check_gradients, check_unused, check_bf16):
        try:
            check(rank)
        except Exception:
            failed[check.__name__] = traceback.format_exc()
            break  # the other worker may wait for this one
    else:
        check_whole_run(rank, folder)
    torch.save(failed, f"{folder}/failed_{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    mp.get_context("forkserver").set_forkserver_preload(["crsm.training.execution", "crsm.tasks", "torch._dynamo"])
    mp.start_processes(work, args=(str(folder),), nprocs=WORLD, start_method="forkserver")
    return folder


@pytest.mark.serial
def test_shards_have_the_gradients_norms_groups_and_sizes_of_the_whole(folder):
    assert [torch.load(folder / f"failed_{rank}") for rank in range(WORLD)] == [{}, {}]


@pytest.mark.serial
def test_what_shards_leave_is_the_state_and_the_model_of_one_process(folder):
    stage = make_stage()
    states = []
    result = run_stage(stage, on_checkpoint=states.append)
    weights, curve = torch.load(folder / "model", weights_only=True)
    assert weights.keys() == stage.model.state_dict().keys()
    for name, tensor in stage.model.state_dict().items():
        assert torch.allclose(weights[name], tensor, atol=1e-4), name
    saved = LoopState.load(folder / "state", "stage_1")
    assert {k: v.shape for k, v in saved.tensors.items()} == {k: v.shape for k, v in states[-1].tensors.items()}
    assert saved.tensors["optimizer/step/model.fusion.logits_L"] == 4
    for found, wanted in zip(curve, result.curve, strict=True):
        for name in ("loss", "gradient_norm", *(key for key in wanted if key.startswith("valid/loss"))):
            assert found.get(name) == pytest.approx(wanted.get(name), abs=1e-4), name


@pytest.mark.serial
def test_one_process_goes_on_from_the_state_of_two_that_share_weights(folder):
    saved = LoopState.load(folder / "state", "stage_1")
    stage = make_stage()
    stage.settings = stage.settings.model_copy(update={"steps": 5})
    run_stage(stage, resume=saved)
    whole = make_stage()
    whole.settings = stage.settings
    run_stage(whole)
    for (name, left), right in zip(whole.named_parameters(), stage.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-4), name
