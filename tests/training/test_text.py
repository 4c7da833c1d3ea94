"""Stage 1 on text and tasks: it learns, resumes exactly, does the same with two workers, and reports bits per byte."""

import math
import shutil
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from crsm.config import load_config
from crsm.data.preparation import SerialExecutor, prepare
from crsm.data.tokenizer import build_tokenizer
from crsm.model import build_model
from crsm.tasks import build_tasks
from crsm.training.backbone import BackboneStage
from crsm.training.execution import run_connected
from crsm.training.loop import LoopState, run_stage
from tests.data.corpora import prose, tiny_config, write_jsonl

STEPS = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_jsonl(folder / "books.jsonl", [prose(seed, words=80) for seed in range(40)])
    prepare(
        tiny_config({"name": "books", "path": str(folder / "books.jsonl"), "valid_share": 0.2}),
        folder,
        SerialExecutor(),
    )
    return folder


def make_stage(shards, steps=STEPS):
    overrides = [
        "model.backbone={d_model: 32, n_layer: 2, d_state: 8, headdim: 16, chunk_size: 16}",
        "model.world_model={width: 16, decoder_width: 16}",
        "model.writer.width=16",
        "tasks=[{name: path_star, arms: 2, length: 3, labels: 12}]",
        f"tokenizer={{kind: file, path: {shards}/tokenizer.json}}",
        f"stage_1={{steps: {steps}, batch: 6, log_every: 1, evaluate_every: 99, evaluate_problems: 4}}",
        "stage_1.checkpoint_every=8",
        f"stage_1.text={{shards: {shards}, share: 0.6, length: 64}}",
        "stage_1.curriculum=[{at: 0.0}, {at: 1.0, share: 0.3}]",
        "stage_1.optimizer={warmup: 2, lr: 0.01, accumulate: 2}",
    ]
    config = load_config(None, overrides)
    tasks = build_tasks(config.tasks)
    tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
    torch.manual_seed(config.seed)
    return BackboneStage(build_model(config, tokenizer), config.stage_1, config.seed, tasks, tokenizer)


def losses(result, name="loss"):
    return [point[name] for point in result.curve if name in point]


@pytest.fixture(scope="module")
def straight(shards):
    torch.set_num_threads(1)
    stage = make_stage(shards)
    before = stage.evaluate()
    states = []
    result = run_stage(stage, on_checkpoint=lambda state: states.append(save(state, shards)))
    return stage, before, result, states


def save(state, folder):
    path = folder / f"state-{state.step}"
    state.save(path)
    return path


def test_the_loss_of_text_falls_and_held_out_text_is_measured_in_bits_per_byte(straight, shards):
    stage, before, result, _ = straight
    text = losses(result, "loss/text")
    assert sum(text[-3:]) < sum(text[:3])
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert 0 < result.metrics[f"valid/{name}/books"] < before[f"valid/{name}/books"]
    # Before training every token is about as likely as any other.
    assert before["valid/loss/books"] == pytest.approx(math.log(stage.rows.tokenizer.vocab_size), rel=0.1)
    bits = before["valid/loss/books"] / math.log(2)
    sizes = stage.rows.tokenizer.byte_counts
    per_token = [
        sizes[batch.tokens_BT[batch.targets_mask_BT]].mean() for batch in stage.rows.text.held_out("books", 4, chunk=8)
    ]
    assert before["valid/bits_per_byte/books"] == pytest.approx(bits / per_token[0], rel=1e-6)


def test_text_has_no_value_loss_and_tasks_keep_theirs(straight):
    stage, _, result, _ = straight
    assert set(losses(result, "value_loss/text")) == {0.0}
    assert min(losses(result, "value_loss/path_star")) > 0
    for batch in stage.batch(0, 0, 0, 1):
        assert batch.step_values > 0  # the whole step's


def test_a_resumed_run_ends_with_the_same_bits(straight, shards):
    stage, _, result, states = straight
    assert [path.name for path in states] == ["state-8", "state-16"]
    resumed = make_stage(shards)
    again = run_stage(resumed, resume=LoopState.load(states[0], "stage_1"))
    assert losses(again)[-8:] == losses(result)[-8:]
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def work(rank, world, folder):
    torch.set_num_threads(1)

    def train():
        stage = make_stage(folder)
        module = DistributedDataParallel(stage, find_unused_parameters=True)
        result = run_stage(stage, rank=rank, world=world, module=module)
        torch.save({"losses": losses(result), "weights": stage.model.state_dict()}, f"{folder}/rank_{rank}")

    run_connected(train, rank=rank, world=world, store=f"{folder}/store", patience=timedelta(seconds=120))


@pytest.mark.serial
def test_two_workers_equal_one(straight, shards):
    mp.spawn(work, args=(2, str(shards)), nprocs=2)
    first, second = (torch.load(shards / f"rank_{rank}", weights_only=True) for rank in (0, 1))
    stage, _, result, _ = straight
    assert first["losses"] == pytest.approx(losses(result), abs=1e-4)
    assert first["losses"] == second["losses"]
    for name, tensor in stage.model.state_dict().items():
        assert torch.allclose(first["weights"][name], tensor, atol=1e-3), name


def test_a_corrupt_shard_stops_the_stage_before_it_begins(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    path = next((copy / "shards").glob("books-train-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=rf"{path.name}' is corrupt"):
        make_stage(copy)
