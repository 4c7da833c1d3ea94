"""Imported weights go through all four stages, whole or with a frozen backbone, and come out with a System 2."""

import pytest
import torch

from crsm.config import (
    ArithmeticConfig,
    DeliberationConfig,
    EngineConfig,
    Gsm8kConfig,
    PathStarConfig,
    SamplingConfig,
    load_config,
)
from crsm.data.tokenizer import build_tokenizer
from crsm.engine import Engine
from crsm.evaluation.rollouts import roll_out
from crsm.generation import GenerationRequest
from crsm.importing import import_checkpoint
from crsm.model import Checkpoint, load_checkpoint, save_checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.tasks import build_task, build_tasks
from crsm.tasks.base import problems
from crsm.training.assembly import AssemblyStage
from crsm.training.backbone import BackboneStage, value_loss
from crsm.training.calibration import calibrate_gates
from crsm.training.dynamics import DynamicsStage
from crsm.training.judgment import JudgmentStage
from crsm.training.loop import run_stage
from crsm.training.stage import tensor_for
from tests.importing.sources import random_model, save_mamba_ssm

pytest.importorskip("transformers")

MARKS = ArithmeticConfig(style="marks", min_operations=1, max_operations=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_mamba_ssm(random_model(tie_word_embeddings=True), tmp_path_factory.mktemp("source"))


@pytest.fixture
def imported(source):
    return import_checkpoint(source, source / "tokenizer.json", name="imported")


def settings_of(*overrides):
    sizes = ("steps=3", "batch=4", "evaluate_problems=4", "log_every=1")
    stages = [f"stage_{stage}.{size}" for stage in (1, 2, 3, 4) for size in sizes]
    return load_config(None, [*stages, "stage_2.unroll=3", "stage_2.roots=4", "stage_2.attempts=2", *overrides])


def first_stage(checkpoint, tasks, *overrides):
    settings = settings_of(*overrides)
    return BackboneStage(checkpoint.model, settings.stage_1, 0, tasks, checkpoint.tokenizer)


def changed_parts(before, model):
    return {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_with_a_frozen_backbone_only_the_critics_change(imported):
    before = copy_of(imported.model)
    stage = first_stage(imported, [build_task(MARKS)], "stage_1.freeze_backbone=true")
    run_stage(stage)
    assert changed_parts(before, imported.model) == {"critic"} == set(stage.trains)


def test_the_loss_of_a_frozen_backbone_is_that_of_the_values(imported):
    stage = first_stage(imported, [build_task(MARKS)], "stage_1.freeze_backbone=true", "stage_1.value_weight=0.5")
    (part,) = batch = stage.batch(0, 0, 0, 1)
    loss, metrics = stage(batch)
    with torch.no_grad():
        hidden, _ = imported.model.backbone(
            tensor_for(imported.model, part.tokens_BT), segment_BT=tensor_for(imported.model, part.segment_BT)
        )
        values = value_loss(
            imported.model,
            hidden[torch.from_numpy(part.value_mask_BT)],
            torch.from_numpy(part.outcome_BT[part.value_mask_BT]),
        )
    assert float(loss.detach()) == pytest.approx(0.5 * float(values.mean()), rel=1e-5) == metrics["loss"]
    loss.backward()
    assert all((p.grad is not None) == name.startswith("critic.") for name, p in imported.model.named_parameters())


def test_a_worker_without_a_judged_token_still_takes_part_in_the_step(imported):
    stage = first_stage(imported, [build_task(MARKS)], "stage_1.freeze_backbone=true")
    parts = stage.batch(0, 0, 5, 6)  # more workers than rows: a row that no loss looks at
    assert not any(part.value_mask_BT.any() for part in parts)
    loss, _ = stage(parts)
    loss.backward()
    assert float(loss.detach()) == 0 and not imported.model.critic.bias_L.grad.any()


def test_a_frozen_backbone_needs_attempts_and_takes_no_text(imported):
    with pytest.raises(ValueError, match="freeze_backbone with task 'gsm8k', which has no attempts to learn from"):
        first_stage(imported, [build_task(Gsm8kConfig(path="sample"))], "stage_1.freeze_backbone=true")
    for key, expected in {
        "stage_1.text={shards: x}": "text with freeze_backbone; allowed: null",
        "stage_1.bootstrap_steps=5": "bootstrap_steps = 5 with freeze_backbone; allowed: 0",
    }.items():
        with pytest.raises(ValueError, match=expected):
            settings_of("stage_1.freeze_backbone=true", key)


def test_training_the_whole_leaves_the_policy_with_the_last_layer(imported):
    before = copy_of(imported.model)
    result = run_stage(first_stage(imported, [build_task(Gsm8kConfig(path="sample"))], "stage_1.batch=2"))
    assert result.metrics["loss"] > 0
    assert imported.model.fusion.weights_L.tolist() == [0.0, 0.0, 1.0]
    # Without attempts nothing teaches the critics; weight decay does not reach them.
    assert changed_parts(before, imported.model) == {"backbone", "lm_head"}
    weights = copy_of(imported.model)
    assert all(bool(tensor.isfinite().all()) for name, tensor in weights.items() if "fusion" not in name)


def test_a_task_in_a_closed_vocabulary_is_open_text_to_an_imported_tokenizer(imported):
    """No word is unknown: what was made for other words can be asked all the same."""
    task = build_task(PathStarConfig(arms=2, length=3, labels=8))
    (problem,) = problems(task, 0, "test", 1)
    ids = imported.tokenizer.encode(problem.prompt)
    assert imported.tokenizer.decode(ids) == problem.prompt


def said(checkpoint, deliberation=None, tokens=24):
    """What a generation says, and how many plans were written on the way."""
    planners = None
    if deliberation is not None:
        planners = InlinePlanners(Deliberator.from_checkpoint(checkpoint), 8)
    engine = Engine(checkpoint, planners, EngineConfig(clock="virtual"))
    prompt = tuple(checkpoint.tokenizer.encode("Question: What is 3 + 4?\nAnswer:"))
    sampling = SamplingConfig(max_tokens=tokens, ignore_eos=True)
    (found,) = engine.generate_all([GenerationRequest(prompt, sampling, deliberation or DeliberationConfig())])
    return found, sum(engine.metrics.injections_per_layer.values())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_four_stages_add_a_system_2(imported, source, frozen, tmp_path):
    settings = settings_of(
        f"stage_1.freeze_backbone={frozen}",
        "tasks=[{name: arithmetic, style: marks, min_operations: 1, max_operations: 2}]",
        "sampling.max_tokens=24",
        "deliberation.lag=1",
        "search.simulations=4",
    )
    original, alone = copy_of(imported.model), said(imported)[0]
    model, tokenizer = imported.model, imported.tokenizer
    model.config = settings.model_copy(update={"model": model.config.model})
    tasks = build_tasks(settings.tasks)
    common = (0, tasks, tokenizer)

    run_stage(BackboneStage(model, settings.stage_1, *common))
    assert said(imported)[0] == alone or not frozen
    report = run_stage(DynamicsStage(model, settings.stage_2, *common)).report()
    checkpoint = Checkpoint(model.eval(), tokenizer, report["trust_horizon"])
    rollouts = [
        rollout
        for system in (1, 2)
        for rollout in roll_out(
            checkpoint, tasks[0], problems(tasks[0], 9, "train", 3), system=system, temperature=1.0, seed=0
        )
    ]
    judged = run_stage(JudgmentStage(model, settings.stage_3, *common, rollouts)).report()
    run_stage(AssemblyStage(model, settings.stage_4, *common, settings.deliberation.plan_length, attempts=2))
    gates = calibrate_gates(checkpoint, tasks, count=8, seed=0, may_open=judged["gates_may_open"])
    assert gates["open"] is False and gates["reason"]  # nobody learns arithmetic in three steps
    changed = {"critic", "world_model", "writer"} | (set() if frozen else {"backbone", "lm_head"})
    assert changed_parts(original, model) == changed

    save_checkpoint(checkpoint, tmp_path / "trained")
    trained = load_checkpoint(tmp_path / "trained")
    after = said(trained)[0]
    assert said(trained, DeliberationConfig(lag=1)) == (after, 0)  # shut: not a plan is written
    layers = model.config.model.backbone.n_layer
    trained.model.gate.calibrate(torch.zeros(layers), torch.full((layers,), 2.0), -10.0)
    with torch.no_grad():  # as a trained writer does, it writes much
        for read_out in (trained.model.writer.u, trained.model.writer.b):
            read_out.bias.normal_(std=3.0)
    assert said(trained, DeliberationConfig(lag=0, injection_rate=0.0))[0] == after
    steered, written = said(trained, DeliberationConfig(lag=0, injection_rate=0.9))
    assert written > 0 and steered != after
    again = build_tokenizer(settings.tokenizer.model_copy(update={"kind": "bpe"}), tasks)
    assert not again.is_foreign and trained.tokenizer.is_foreign  # the source's own all the way
