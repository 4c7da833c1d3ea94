"""Peers have the size that they claim, see the rows that ours sees, and are measured as ours is."""

import dataclasses
import math

import pytest
import torch

from crsm.config import BackboneConfig, load_config
from crsm.data.preparation import SerialExecutor, prepare
from crsm.data.tokenizer import build_tokenizer
from crsm.model import Checkpoint, build_model, save_checkpoint
from crsm.tasks import build_tasks
from crsm.training.loop import STATE_FILE, LoopState, run_stage
from crsm.training.rows import BackboneRows
from jobs.benchmark_text import main
from jobs.command import invoke
from jobs.peers.language_models import TEXT_PEERS, PeerStage, build_peer, gpt2_layers, language_parameters
from jobs.peers.training import PeerTraining, train_peer
from tests.data.corpora import prose, tiny_config, write_jsonl

pytest.importorskip("transformers")

SIZES = BackboneConfig(vocab_size=300, d_model=64, n_layer=4, d_state=16, headdim=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "books.jsonl", [prose(seed, words=80) for seed in range(40)])
    prepare(
        tiny_config({"name": "books", "path": str(folder / "books.jsonl"), "valid_share": 0.2}),
        folder,
        SerialExecutor(),
    )
    config = load_config(
        None,
        [
            "model.backbone={d_model: 32, n_layer: 2, d_state: 8, headdim: 16, chunk_size: 16}",
            "model.world_model={width: 16, decoder_width: 16}",
            "model.writer.width=16",
            "tasks=[{name: path_star, arms: 2, length: 3, labels: 12}]",
            f"tokenizer={{kind: file, path: {folder}/tokenizer.json}}",
            "stage_1={steps: 6, batch: 6, log_every: 1, evaluate_problems: 4, checkpoint_every: 3}",
            f"stage_1.text={{shards: {folder}, share: 0.6, length: 64}}",
            "stage_1.optimizer={warmup: 2, lr: 0.01}",
        ],
    )
    tokenizer = build_tokenizer(config.tokenizer, build_tasks(config.tasks), config.seed)
    torch.manual_seed(0)
    save_checkpoint(Checkpoint(build_model(config, tokenizer).eval(), tokenizer), folder / "checkpoint")
    return folder / "checkpoint", config, tokenizer


def test_the_mamba2_peer_has_our_backbones_parameters_without_the_fusion():
    torch.manual_seed(0)
    config = load_config(None, ["model.backbone={d_model: 64, n_layer: 4, d_state: 16, headdim: 32, vocab_size: 0}"])
    tokenizer = build_tokenizer(config.tokenizer, build_tasks(config.tasks), 0)
    ours = build_model(config, tokenizer)
    peer = build_peer("mamba2", ours.config.model.backbone)
    assert language_parameters(peer) == language_parameters(ours) - ours.num_parameters()["fusion"]


@pytest.mark.parametrize("layers", [6, 12])
def test_the_gpt2_peer_comes_as_close_to_our_size_as_a_layer_allows(layers):
    sizes = SIZES.model_copy(update={"n_layer": layers, "d_model": 128})
    target = language_parameters(build_peer("mamba2", sizes))
    width = sizes.d_model
    assert gpt2_layers(sizes) > 1
    assert abs(language_parameters(build_peer("gpt2", sizes)) - target) <= (12 * width**2 + 13 * width) / 2


@pytest.mark.parametrize("name", TEXT_PEERS)
def test_padding_and_what_follows_change_nothing_of_a_peers_loss(checkpoint, name):
    _, config, tokenizer = checkpoint
    torch.manual_seed(0)
    sizes = config.model.backbone.model_copy(update={"vocab_size": tokenizer.vocab_size})
    stage = PeerStage(build_peer(name, sizes), config.stage_1, 0, build_tasks(config.tasks), tokenizer).eval()
    for part in stage.batch(0, 0, 0, 1):
        with torch.no_grad():
            whole = stage.cross_entropy(part)
            rows = []
            for b in range(part.num_rows):
                logits_TV = stage.peer(
                    input_ids=torch.from_numpy(part.tokens_BT[b : b + 1, : part.lengths_B[b]])
                ).logits[0]
                at = part.targets_mask_BT[b].nonzero()[0]
                logp_TV = logits_TV.log_softmax(-1)
                rows += [-float(logp_TV[t - 1, part.tokens_BT[b, t]]) for t in at]
        assert float(whole) == pytest.approx(sum(rows), rel=1e-4)


def test_a_peer_sees_the_rows_of_our_stage_1(checkpoint):
    _, config, tokenizer = checkpoint
    tasks = build_tasks(config.tasks)
    sizes = config.model.backbone.model_copy(update={"vocab_size": tokenizer.vocab_size})
    stage = PeerStage(build_peer("gpt2", sizes), config.stage_1, 0, tasks, tokenizer)
    ours = BackboneRows(config.stage_1, 0, tasks, tokenizer)
    for mine, other in zip(stage.batch(3, 0, 0, 1), ours.batch(3, 0, 0, 1), strict=True):
        assert (mine.tokens_BT == other.tokens_BT).all()
        assert (mine.targets_mask_BT == other.targets_mask_BT).all()


def test_a_training_goes_on_and_ends_in_the_same_figures(checkpoint, tmp_path, capsys):
    import json

    path, config, tokenizer = checkpoint

    def figures(folder, name):
        where = [f"--folder={folder}", f"--json={tmp_path / name}", "--workers=1"]
        status = invoke(main, [f"--checkpoint={path}", "--peer=mamba2", "--no-compile", *where])
        assert status == 0, capsys.readouterr().err
        return json.loads((tmp_path / name).read_text())["results"]["models"]

    first = figures(tmp_path / "peers", "one.json")
    again = figures(tmp_path / "peers", "two.json")  # everything is done: only evaluated again
    assert first["mamba2"]["valid/bits_per_byte/books"] == again["mamba2"]["valid/bits_per_byte/books"]
    assert first["mamba2"]["steps"] == 6
    torch.manual_seed(config.seed)
    sizes = config.model.backbone.model_copy(update={"vocab_size": tokenizer.vocab_size})
    stage = PeerStage(build_peer("mamba2", sizes), config.stage_1, 0, build_tasks(config.tasks), tokenizer)
    run_stage(stage)
    want = stage.eval().held_out_text(10**9)["valid/bits_per_byte/books"]
    assert first["mamba2"]["valid/bits_per_byte/books"] == pytest.approx(want, rel=1e-5)
    assert first["crsm"]["valid/loss/books"] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.1)


@pytest.mark.serial
def test_two_workers_go_on_where_one_was_and_come_to_the_same_figures(checkpoint, tmp_path):
    path, _, _ = checkpoint
    training = PeerTraining("gpt2", str(path), None, None, None, tmp_path / "alone", workers=1, compiled=False)
    alone, result = train_peer(training)
    want = [point["loss"] for point in result.curve if "loss" in point]

    together = tmp_path / "together"
    halfway = {"folder": together, "overrides": ["stage_1.steps=3"]}
    train_peer(dataclasses.replace(training, **halfway))
    state = LoopState.load(together / STATE_FILE, "peer")
    state.fingerprint["stage_1"]["steps"] = 6
    state.save(together / STATE_FILE)
    both, result = train_peer(dataclasses.replace(training, folder=together, workers=2))
    assert result.steps == 6
    assert [point["loss"] for point in result.curve if "loss" in point] == pytest.approx(want, rel=1e-5)
    for mine, other in zip(alone.peer.parameters(), both.peer.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)


def test_bad_input_is_one_line(checkpoint, capsys):
    path, _, _ = checkpoint
    assert invoke(main, [f"--checkpoint={path}", "--peer=bert"]) == 2
    assert "peer 'bert'; allowed: mamba2, gpt2" in capsys.readouterr().err
    assert invoke(main, ["--checkpoint=nano"]) == 2
    assert "stage_1.text of 'nano' is not set; allowed: a checkpoint trained on shards" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEXT_PEERS)
@torch.no_grad()
def test_rows_that_are_padded_for_the_compiler_lose_what_they_lost(checkpoint, name):
    _, config, tokenizer = checkpoint
    tasks = build_tasks(config.tasks)
    sizes = build_model(config, tokenizer).config.model.backbone
    stage = PeerStage(build_peer(name, sizes), config.stage_1, 0, tasks, tokenizer).eval()
    batch = stage.batch(0, 0, 0, 1)
    plain, _ = stage(batch)
    stage.multiple = 64
    padded, _ = stage(batch)
    assert any(part.tokens_BT.shape[1] % 64 for part in batch)
    assert float(padded) == pytest.approx(float(plain), rel=1e-5)
