"""The shared training loop: it learns, resumes exactly, stops before it breaks anything, and saves whole states."""

import errno
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from crsm.config import DynamicsStageConfig, OptimizerConfig, StageConfig
from crsm.data.sequences import training_batch
from crsm.model import PARTS
from crsm.training import state as state_module
from crsm.training.loop import LoopState, count_tokens, run_stage
from crsm.training.optimizer import build_optimizer, learning_rate
from crsm.training.stage import Stage
from jobs.command import describe

PLAIN = OptimizerConfig(lr=0.1, warmup=0, schedule="constant", weight_decay=0.0, clip=1e9)


class Regression(Stage):
    """Logistic regression on four features; the whole of a training run fits into a test."""

    name = "regression"

    def __init__(self, settings, seed=0, noise=0.0, poison=lambda step: 0.0):
        nn.Module.__init__(self)
        self.settings, self.seed, self.world, self.noise, self.poison = settings, seed, 1, noise, poison
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def batch(self, step, micro, rank, world):
        accumulate = self.settings.optimizer.accumulate
        rows = self.settings.batch // accumulate
        whole = np.random.default_rng((self.seed, step))
        x = whole.standard_normal((self.settings.batch, 4)).astype(np.float32)
        y = (whole.random(self.settings.batch) < 1 / (1 + np.exp(-x @ TRUTH))).astype(np.float32)
        part = slice(micro * rows, (micro + 1) * rows)
        return step, torch.from_numpy(x[part]), torch.from_numpy(y[part])

    def forward(self, batch):
        step, x, y = batch
        x = x + self.noise * torch.randn_like(x)
        fit = F.binary_cross_entropy_with_logits(self.linear(x).squeeze(1), y)
        extra = self.linear.weight.sum() * self.poison(step)
        loss = fit + extra
        return loss, {"fit": float(fit.detach()), "extra": float(extra.detach()), "loss": float(loss.detach())}

    def evaluate(self):
        return {"valid/norm": float(self.linear.weight.detach().norm())}


TRUTH = np.array([1.0, -2.0, 0.5, 0.0], dtype=np.float32)


def settings(steps=8, batch=16, optimizer=PLAIN, **others):
    return StageConfig(steps=steps, batch=batch, optimizer=optimizer, log_every=1, **others)


def weights(stage):
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# -------------------------------------------------------------------------------------------------------- learning


def test_it_reaches_the_entropy_of_the_labels():
    stage = Regression(settings(steps=300, batch=256))
    run_stage(stage)
    x = np.random.default_rng(9).standard_normal((20_000, 4)).astype(np.float32)
    p = 1 / (1 + np.exp(-x @ TRUTH))
    entropy = float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())
    with torch.no_grad():
        q = torch.sigmoid(stage.linear(torch.from_numpy(x))).squeeze(1).numpy()
    cross = float(-(p * np.log(q) + (1 - p) * np.log(1 - q)).mean())
    assert entropy <= cross < entropy + 0.01


def test_stage_1_learns_the_form_of_answers(make_stage):
    stage = make_stage("stage_1", "stage_1.steps=250", "stage_1.optimizer={lr: 5.0e-3, warmup: 10}")
    result = run_stage(stage)
    # Who knows the form but nothing else guesses each node among all labels, and the verdict.
    (batch,) = training_batch(stage.tasks, stage.tokenizer, stage.settings, seed=0, step=0, batch=8, split="valid")
    targets = batch.targets_mask_BT.sum() / batch.num_rows
    task = stage.tasks[0]
    nodes = len(task.generate(0, "valid", 0).solution.split()) - len(task.preamble.split())
    bound = (nodes * math.log(12) + math.log(2)) / targets
    assert result.metrics["valid/loss/path_star"] < bound
    assert result.curve[0]["loss"] > bound


# -------------------------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def run_killed(make, folder, kill_at):
    """Runs until the loop has logged step ``kill_at``, then goes on from the last state in a new process's place."""

    def save(state):
        state.save(folder / "state")

    def die(point):
        if point["step"] == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run_stage(make(), on_log=die, on_checkpoint=save)
    stage = make()
    path = folder / "state"
    resume = LoopState.load(path, stage.name) if path.exists() else None
    assert (resume.step if resume else 0) < kill_at
    return stage, run_stage(stage, resume=resume, on_checkpoint=save)


def without_clocks(curve):
    return [{k: v for k, v in point.items() if k not in ("seconds", "tokens_per_second")} for point in curve]


def test_a_state_is_saved_when_it_is_asked_for():
    stage, saved = Regression(settings(checkpoint_every=5)), []
    asked = iter([False, True, False, False, False, False, True, False])
    run_stage(stage, on_checkpoint=lambda state: saved.append(state.step), save_now=lambda: next(asked))
    assert saved == [2, 5, 7, 8]


@pytest.mark.parametrize("kill_at", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kill_at, ema):
    optimizer = PLAIN.model_copy(update={"ema": ema, "weight_decay": 0.1, "accumulate": 2})

    def make():
        # Noise in the forward pass: the random numbers have to go on where they were, too.
        return Regression(settings(checkpoint_every=3, evaluate_every=2, optimizer=optimizer), noise=0.3)

    straight = make()
    whole = run_stage(straight)
    stage, result = run_killed(make, tmp_path, kill_at)
    assert_same(weights(stage), weights(straight))
    assert result.metrics == whole.metrics
    assert without_clocks(result.curve) == without_clocks(whole.curve)


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3", "stage_4"])
def test_every_stage_resumes_exactly(make_stage, tmp_path, name):
    def make():
        return make_stage(name, f"{name}.steps=6", f"{name}.checkpoint_every=2", f"{name}.optimizer.warmup=2")

    straight = make()
    whole = run_stage(straight)
    stage, result = run_killed(make, tmp_path, 4)
    assert_same(weights(stage), weights(straight))
    assert repr(result.metrics) == repr(whole.metrics)  # a nan is equal to a nan here


def test_a_state_of_the_last_step_is_only_finished(tmp_path):
    make = lambda: Regression(settings(optimizer=PLAIN.model_copy(update={"ema": 0.5})))  # noqa: E731
    straight = make()
    run_stage(straight, on_checkpoint=lambda state: state.save(tmp_path / "state"))
    stage = make()
    state = LoopState.load(tmp_path / "state", "regression")
    result = run_stage(stage, resume=state, on_log=lambda point: pytest.fail("a step was made"))
    assert state.step == result.steps == 8
    assert_same(weights(stage), weights(straight))


def test_logging_between_checkpoints_does_not_change_the_figures(tmp_path):
    make = lambda: Regression(StageConfig(steps=10, batch=16, optimizer=PLAIN, log_every=5, checkpoint_every=3))  # noqa: E731
    whole = run_stage(make())
    states = []
    run_stage(make(), on_checkpoint=lambda state: states.append(state.step) or state.save(tmp_path / str(state.step)))
    assert states == [3, 6, 9, 10]
    result = run_stage(make(), resume=LoopState.load(tmp_path / "3", "regression"))
    assert without_clocks(result.curve) == without_clocks(whole.curve)


# ---------------------------------------------------------------------------------------------------- finite check


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(poison):
    states = []

    def keep(state):
        states.append({name: tensor.clone() for name, tensor in state.tensors.items()})

    stage = Regression(settings(checkpoint_every=1), poison=lambda step: poison if step == 3 else 0.0)
    with pytest.raises(FloatingPointError, match=r"regression, step 3: extra = -?(nan|inf); nothing was updated"):
        run_stage(stage, on_checkpoint=keep)
    assert len(states) == 3
    for name, tensor in stage.named_parameters():
        if tensor.requires_grad:
            assert torch.equal(tensor, states[-1][f"weights/{name}"])


def test_a_gradient_that_is_not_finite_stops_too():
    class Root(Regression):
        def forward(self, batch):
            loss = (self.linear.weight * 0).abs().sqrt().sum()  # 0, with an infinite slope
            return loss, {"loss": float(loss.detach())}

    stage = Root(settings())
    before = weights(stage)
    with pytest.raises(FloatingPointError, match=r"step 0: gradient norm = (nan|inf)"):
        run_stage(stage)
    assert_same(weights(stage), before)


# -------------------------------------------------------------------------------------------------------- optimizer


def test_two_micro_batches_equal_one_of_twice_the_size():
    runs = []
    for accumulate in (1, 2):
        stage = Regression(settings(optimizer=PLAIN.model_copy(update={"accumulate": accumulate, "clip": 0.5})))
        run_stage(stage)
        runs.append(weights(stage))
    for name in runs[0]:
        assert torch.allclose(runs[0][name], runs[1][name], atol=1e-6), name


def test_the_averaged_weights_are_what_is_left():
    seen = []
    stage = Regression(settings(steps=5, checkpoint_every=1, optimizer=PLAIN.model_copy(update={"ema": 0.75})))
    start = stage.linear.weight.detach().clone()
    run_stage(stage, on_checkpoint=lambda state: seen.append(state.tensors["weights/linear.weight"].clone()))
    average = start
    for weight in seen:
        average = 0.75 * average + 0.25 * weight
    assert torch.allclose(stage.linear.weight, average, atol=1e-6)
    assert not torch.allclose(stage.linear.weight, seen[-1])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.6, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.6, 0.2]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.2]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    config = OptimizerConfig(lr=1.0, warmup=2, schedule=schedule, final_lr=0.2, wsd_decay=0.5)
    found = [learning_rate(step, 10, config) for step in (0, 1, 2, 6, 10)]
    assert found == pytest.approx(expected)
    # A quarter of the way down: the cosine lags behind the line, the stable phase of WSD has not ended.
    quarter = {"constant": 1.0, "linear": 0.8, "cosine": 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, "wsd": 1.0}
    assert learning_rate(4, 10, config) == pytest.approx(quarter[schedule])


def test_the_loop_sets_the_scheduled_rate():
    config = PLAIN.model_copy(update={"warmup": 4, "schedule": "linear"})
    result = run_stage(Regression(settings(optimizer=config)))
    rates = [point["lr"] for point in result.curve if "lr" in point]
    assert rates == pytest.approx([learning_rate(step, 8, config) for step in range(8)])


def test_gradients_are_clipped_and_their_norm_is_reported():
    clipped = Regression(settings(steps=1, optimizer=PLAIN.model_copy(update={"clip": 1e-3})))
    result = run_stage(clipped)
    total = torch.cat([p.grad.flatten() for p in clipped.parameters() if p.grad is not None]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-3)
    assert result.curve[0]["gradient_norm"] > 1e-2


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3", "stage_4"])
def test_weight_decay_groups_hold_every_trained_parameter_once(make_stage, name):
    stage = make_stage(name)
    groups = build_optimizer(stage, stage.settings.optimizer).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in stage.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trained
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    for parameter_name, parameter in stage.named_parameters():
        if parameter_name.endswith(("A_log", ".D", "dt_bias", ".bias", "norm.weight")):
            assert id(parameter) not in decayed, parameter_name


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3", "stage_4"])
def test_a_stage_changes_its_parts_and_no_other(make_stage, name):
    stage = make_stage(name, f"{name}.steps=3")
    before = weights(stage.model)
    run_stage(stage)
    changed = set()
    for key, tensor in stage.model.state_dict().items():
        if not torch.equal(tensor, before[key]):
            changed.add(key.split(".")[0])
    assert changed == set(stage.trains)
    assert set(stage.trains) < set(PARTS)


def test_tokens_are_counted_without_padding(make_stage):
    stage = make_stage("stage_1")
    problem = stage.tasks[0].generate(0, "train", 0)
    sequence = len(f"{problem.prompt} {problem.solution}".split()) + 1  # of one length here; the verdict closes it
    assert count_tokens(stage.batch(0, 0, 0, 1)) == 8 * sequence
    assert [count_tokens(stage.batch(0, 0, rank, 2)) for rank in (0, 1)] == [4 * sequence] * 2
    prompt = len(problem.prompt.split())
    assert count_tokens(make_stage("stage_2").batch(0, 0, 0, 1)) == 8 * (prompt + 4 * (sequence - prompt))
    assert count_tokens(make_stage("stage_4").batch(0, 0, 0, 1)) == 2 * (prompt + 4 * (sequence - prompt))
    assert count_tokens("no text at all") == 0
    assert run_stage(make_stage("stage_1", "stage_1.steps=2")).tokens_per_second > 0


# ------------------------------------------------------------------------------------------------------------ states


@pytest.fixture
def state(tmp_path):
    """A stage in the middle of its run, and where its state lies."""
    path = tmp_path / "folder" / "state"
    stage = Regression(settings(checkpoint_every=4))
    run_stage(stage, fingerprint={"seed": 0, "tasks": [{"arms": 3}]}, on_checkpoint=lambda s: s.save(path))
    return path


def test_a_state_is_what_was_saved(state):
    loaded = LoopState.load(state, "regression", {"seed": 0, "tasks": ({"arms": 3},)})
    assert (loaded.step, len(loaded.curve)) == (8, 8)
    assert loaded.tensors["optimizer/step/linear.weight"] == 8
    assert "weights/frozen" not in loaded.tensors


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_state_is_refused_with_both_lengths(state, share):
    whole = state.read_bytes()
    cut = int(len(whole) * share)
    state.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=rf"{cut} bytes") as error:
        LoopState.load(state, "regression")
    if share > 0.9:
        assert str(len(whole)) in str(error.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": 1, "tasks": [{"arms": 3}]}, "seed = 0; the settings ask 1"),
        ({"seed": 0, "tasks": [{"arms": 5}]}, r"tasks.0.arms = 3; the settings ask 5"),
        ({"seed": 0}, r"tasks.0.arms = 3; the settings ask None"),
    ],
)
def test_a_state_of_other_settings_is_refused(state, asked, message):
    with pytest.raises(ValueError, match=message):
        LoopState.load(state, "regression", asked)


def test_a_state_of_another_stage_is_refused(state):
    with pytest.raises(ValueError, match=r"'regression'.*'stage_1'"):
        LoopState.load(state, "stage_1")
    with pytest.raises(ValueError, match="cannot be read"):
        LoopState.load(state.parent / "nothing", "stage_1")


@pytest.mark.parametrize("change", ["missing", "shape", "left over"])
def test_a_state_that_does_not_fit_is_refused(state, change):
    loaded = LoopState.load(state, "regression")
    if change == "missing":
        del loaded.tensors["weights/linear.bias"]
        message = r"'weights/linear.bias' is missing.*\(1,\)"
    elif change == "shape":
        loaded.tensors["optimizer/exp_avg/linear.weight"] = torch.zeros(2, 2)
        message = r"shape \(2, 2\).*\(1, 4\)"
    else:
        loaded.tensors["average/linear.weight"] = torch.zeros(1, 4)
        message = "'average/linear.weight' has no place"
    with pytest.raises(ValueError, match=message):
        run_stage(Regression(settings()), resume=loaded)


def test_a_state_beyond_the_last_step_is_refused(state):
    with pytest.raises(ValueError, match="step 8; the settings ask 4"):
        run_stage(Regression(settings(steps=4)), resume=LoopState.load(state, "regression"))


@pytest.mark.parametrize("fault", ["fsync", "save_file"])
def test_a_full_disk_leaves_the_former_state(state, monkeypatch, fault):
    before = state.read_bytes()

    def full(*args, **kwargs):
        if fault == "save_file":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_module if fault == "save_file" else os, fault, full)
    stage = Regression(settings(checkpoint_every=4))
    with pytest.raises(OSError, match="No space left on device") as error:
        run_stage(stage, on_checkpoint=lambda s: s.save(state))
    assert "\n" not in describe(error.value)
    monkeypatch.undo()
    assert state.read_bytes() == before
    assert LoopState.load(state, "regression").step == 8
    assert [path.name for path in state.parent.iterdir()] == ["state"]


def test_reports_are_plain_and_short():
    result = run_stage(Regression(settings(steps=2)))
    report = result.report()
    assert report["steps"] == 2 and report["loss"] == result.metrics["loss"] and "valid/norm" in report
    assert all(value == float(f"{value:.6g}") for point in report["curve"] for value in point.values())
    assert DynamicsStageConfig().log_every == 25  # curves stay short: a few hundred points
