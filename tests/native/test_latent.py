"""The latent network in C++ against its definition in PyTorch, and the guarantees that only it gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm import native
from crsm.model import CRSM, load_checkpoint
from crsm.native.latent import LatentFuture, LatentNetwork
from crsm.reasoning import Future, NetworkEvaluator, project
from crsm.search import Evaluation
from crsm.search.native import PythonView
from tests.native.latent_models import SHAPES, another_world_model, random_model, random_snapshot, random_tokens

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native core: {native.MISSING}")

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """PyTorch's products are small here; threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[*SHAPES, "nano"])
def model(request: pytest.FixtureRequest) -> CRSM:
    return load_checkpoint("nano").model if request.param == "nano" else random_model(**SHAPES[request.param])


@pytest.fixture(scope="module")
def small() -> CRSM:
    return random_model(**SHAPES["odd widths"])


NETWORKS: dict[CRSM, LatentNetwork] = {}


def packed(model: CRSM) -> LatentNetwork:
    network = NETWORKS.get(model)
    if network is None or not network.is_current(model, model.world_model):
        network = NETWORKS[model] = LatentNetwork.from_model(model, model.world_model)
    return network


@torch.inference_mode()
def futures(model: CRSM, count: int, lag: int = 1, hypotheses: int = 1) -> tuple[Future, LatentFuture, Any]:
    """Projections of both kinds, and the packed memory."""
    snapshot, known_B, network = random_snapshot(model, count), random_tokens(model, count), packed(model)
    memory = network.memory(snapshot.memory_BMHPN.numpy())
    expected = project(model, model.world_model, snapshot, known_B, lag, hypotheses)
    found = network.project(memory, snapshot.hidden_BLD.numpy(), known_B.numpy(), lag, hypotheses)
    return expected, found, memory


def evaluator_of(model: CRSM, count: int = 5, *, actions: int = 4, slots: int = 9, threads: int = 0) -> Any:
    """A native evaluator whose roots are evaluated, and their evaluations. Tokens 1 and 2 end the text."""
    _, found, memory = futures(model, count)
    evaluator = packed(model).evaluator(memory, found, actions, [1, 2], threads)
    return evaluator, evaluator.evaluate_roots(slots)


def rows(*columns: Any) -> list[np.ndarray]:
    return [np.array(column, np.int64) for column in columns]


def fields(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return evaluation.actions_BA, evaluation.prior_logits_BA, evaluation.values_BL


def assert_best_of(found: Evaluation, everything: Evaluation) -> None:
    """The best of all tokens, up to rounding: neighbours that are equally likely may have changed places."""
    actions = found.actions_BA.shape[1]
    log_probs_BV = np.empty_like(everything.prior_logits_BA)
    np.put_along_axis(log_probs_BV, everything.actions_BA, everything.prior_logits_BA, axis=1)
    np.testing.assert_allclose(found.prior_logits_BA, everything.prior_logits_BA[:, :actions], **CLOSE)
    np.testing.assert_allclose(
        found.prior_logits_BA, np.take_along_axis(log_probs_BV, found.actions_BA, axis=1), **CLOSE
    )
    assert all(len(set(row)) == len(row) for row in found.actions_BA.tolist())
    np.testing.assert_allclose(found.values_BL, everything.values_BL, **CLOSE)


# Against PyTorch ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_evaluator_is_the_one_in_pytorch(model: CRSM) -> None:
    """Roots, then a line of moves, ends among them, with some trees at rest; with more actions than tokens, too."""
    count, vocabulary = 5, model.config.model.backbone.vocab_size
    tokens_SB = [random_tokens(model, count, seed).numpy() for seed in (2, 3)]
    tokens_SB += [np.array([1, 2, 0, 1, 2]), random_tokens(model, count, 4).numpy()]
    for actions in (1, 6, vocabulary + 1 if vocabulary < 100 else 16):
        expected, found, memory = futures(model, count)
        reference = NetworkEvaluator(model, model.world_model, expected, vocabulary, 5, (1, 2))
        view = PythonView(packed(model).evaluator(memory, found, actions, (1, 2)), 5)
        assert (view.num_trees, view.num_actions, view.num_layers) == (
            count,
            min(actions, vocabulary),
            reference.num_layers,
        )
        assert_best_of(view.root(), reference.root())
        active_B = np.array([True, True, False, True, True])
        for slot, token_B in enumerate(tokens_SB, start=1):
            parent_B = np.where(active_B, slot - 1, 0)
            arguments = (parent_B, token_B, np.full(count, slot), active_B)
            mine, theirs = view.expand(*arguments), reference.expand(*arguments)
            assert_best_of(*(Evaluation(*(array[active_B] for array in fields(e))) for e in (mine, theirs)))
            assert not any(array[~active_B].any() for array in fields(mine))


@pytest.mark.parametrize(("lag", "hypotheses"), [(0, 1), (0, 3), (1, 1), (3, 1), (1, 3), (3, 5), (2, 40)])
def test_the_projection_is_the_one_in_pytorch(model: CRSM, lag: int, hypotheses: int) -> None:
    expected, found, _ = futures(model, 4, lag, hypotheses)
    np.testing.assert_array_equal(found.assumed_FT, expected.assumed_FT)
    np.testing.assert_allclose(found.latent_FG, expected.latent[0], **CLOSE)
    np.testing.assert_allclose(found.hidden_FLD, expected.hidden_FLD, rtol=1e-5, atol=1e-4)
    each = len(found.memory_F) // 4
    np.testing.assert_array_equal(found.memory_F, np.repeat(np.arange(4), each))
    assert found.assumed_FT.shape == (4 * each, lag)


@torch.inference_mode()
def test_one_step_and_the_heads_are_those_in_pytorch(model: CRSM) -> None:
    network, snapshot, token_R = packed(model), random_snapshot(model, 3), random_tokens(model, 3)
    expected, _, memory = futures(model, 3)
    (latent_RG,), hidden_RLD = model.world_model.advance(expected.latent, snapshot, token_R)
    found_RG, found_RLD = network.advance(memory, np.arange(3), expected.latent[0].numpy(), token_R.numpy())
    np.testing.assert_allclose(found_RG, latent_RG, **CLOSE)
    np.testing.assert_allclose(found_RLD, hidden_RLD, rtol=1e-5, atol=1e-4)
    logits_RV, values_RL = network.heads(hidden_RLD.numpy())
    np.testing.assert_allclose(logits_RV, model.logits(hidden_RLD), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(values_RL, model.critic(hidden_RLD), **CLOSE)


@torch.inference_mode()
def test_a_mixture_of_the_last_layer_alone() -> None:
    model = random_model(**SHAPES["odd widths"])
    model.fusion.use_last_layer()
    hidden_RLD = random_snapshot(model, 3).hidden_BLD
    logits_RV, _ = packed(model).heads(hidden_RLD.numpy())
    np.testing.assert_allclose(logits_RV, model.logits(hidden_RLD), **CLOSE)


def test_a_table_of_all_tokens_is_made_only_for_a_small_vocabulary() -> None:
    """40,000 tokens · (3·120 + 2·64) products · 4 bytes are 78 MB."""
    large = random_model(**SHAPES["a vocabulary too large for a table"])
    assert not packed(large)._weights.has_table and packed(random_model())._weights.has_table


# Guarantees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd widths", "a vocabulary of three slices", "a vocabulary too large for a table"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_bit_by_bit_what_it_is_alone(name: str, threads: int) -> None:
    model, count = random_model(**SHAPES[name]), 60
    evaluator, roots = evaluator_of(model, count, threads=threads)
    leaves = [*rows(range(count), [0] * count), random_tokens(model, count).numpy(), *rows([1] * count)]
    together = evaluator.evaluate_leaves(*leaves)
    alone, alone_roots = evaluator_of(model, count, threads=1)
    for mine, other in zip(roots, alone_roots, strict=True):
        np.testing.assert_array_equal(mine, other)
    for row in range(0, count, 7):
        single = alone.evaluate_leaves(*(column[row : row + 1] for column in leaves))
        for whole, one in zip(together, single, strict=True):
            np.testing.assert_array_equal(whole[row], one[0])


@settings(max_examples=30, deadline=None)
@given(trees=st.lists(st.integers(0, 6), min_size=1, max_size=20), threads=st.integers(1, 3))
def test_any_leaves_in_any_order_give_the_same_bits(small: CRSM, trees: list[int], threads: int) -> None:
    """Several leaves of a tree in one call, too."""
    tokens = [(7 * row + tree) % 53 for row, tree in enumerate(trees)]
    nodes = list(range(1, len(trees) + 1))
    evaluator, _ = evaluator_of(small, 7, slots=22, threads=threads)
    together = evaluator.evaluate_leaves(*rows(trees, [0] * len(trees), tokens, nodes))
    for row, (tree, token) in enumerate(zip(trees, tokens, strict=True)):
        single = evaluator.evaluate_leaves(*rows([tree], [0], [token], [21]))
        for whole, one in zip(together, single, strict=True):
            np.testing.assert_array_equal(whole[row], one[0])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_computes_it(isa: str) -> None:
    if native.require().isa() == isa:
        pytest.skip("that is what the other tests run with")
    names = "(pytorch or bit_by_bit or ties) and not nano"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__]
    environment = {**os.environ, "CRSM_NATIVE_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_terminal_token_takes_over_the_value_of_the_position_it_ends(small: CRSM) -> None:
    evaluator, (_, _, root_BL) = evaluator_of(small)
    _, _, moved_RL = evaluator.evaluate_leaves(*rows([3], [0], [9], [1]))
    assert not np.array_equal(moved_RL[0], root_BL[3])
    _, _, ended_RL = evaluator.evaluate_leaves(*rows([3, 3, 4], [0, 1, 0], [1, 2, 2], [2, 3, 2]))
    np.testing.assert_array_equal(ended_RL, [root_BL[3], moved_RL[0], root_BL[4]])
    # And so does an end after an end.
    _, _, again_RL = evaluator.evaluate_leaves(*rows([3], [3], [1], [4]))
    np.testing.assert_array_equal(again_RL[0], moved_RL[0])


def test_trees_that_rest_keep_what_they_have(small: CRSM) -> None:
    evaluator, _ = evaluator_of(small, 3)
    view = PythonView(evaluator, 9)
    zero, one, everyone = np.zeros(3, np.int64), np.ones(3, np.int64), np.ones(3, np.bool_)
    view.expand(zero, np.array([5, 6, 7]), one, everyone)
    before = view.expand(one, np.array([8, 8, 8]), 2 * one, everyone)
    view.expand(zero, np.array([9, 9, 9]), one, np.array([True, False, False]))
    after = view.expand(one, np.array([8, 8, 8]), 2 * one, everyone)
    for mine, other in zip(fields(before), fields(after), strict=True):
        np.testing.assert_array_equal(mine[1:], other[1:])
    assert not np.array_equal(before.values_BL[0], after.values_BL[0])


def test_ties_go_to_the_lowest_token() -> None:
    """Equal rows of the head are equal logits: over three slices, and in the beam of a projection."""
    model = random_model(vocab_size=4500, tie_embeddings=False)
    model.lm_head.weight[:] = model.lm_head.weight[0].clone()
    _, (actions_BA, logits_BA, _) = evaluator_of(model, 3, actions=20)
    assert (actions_BA == np.arange(20)).all()
    np.testing.assert_allclose(logits_BA, -np.log(4500), rtol=1e-6)
    # Even tokens from 2002 on are one class, all others have logit 0: one of the two is the best.
    model.lm_head.weight[:2001] = 0.0
    model.lm_head.weight[2001::2] = 0.0
    _, (actions_BA, _, _) = evaluator_of(model, 8, actions=6)
    classes = {tuple(range(2002, 2014, 2)), tuple(range(6))}
    assert {tuple(row) for row in actions_BA.tolist()} == classes
    _, found, _ = futures(model, 8, lag=1, hypotheses=3)
    assert {tuple(row) for row in found.assumed_FT.reshape(8, 3).tolist()} <= {row[:3] for row in classes}


def test_latents_move_with_a_tree_that_is_used_again(small: CRSM) -> None:
    evaluator, _ = evaluator_of(small, 2, slots=4)
    evaluator.evaluate_leaves(*rows([0, 1], [0, 0], [5, 6], [1, 1]))
    evaluator.evaluate_leaves(*rows([0, 1], [1, 1], [7, 8], [2, 2]))
    expected = evaluator.evaluate_leaves(*rows([0, 1, 0], [2, 1, 1], [9, 9, 2], [3, 3, 3]))
    # Both trees go on from slot 1, and get room for more nodes.
    evaluator.remap(np.array([[-1, 0, 1, -1], [-1, 0, -1, -1]]), 12)
    found = evaluator.evaluate_leaves(*rows([0, 1, 0], [1, 0, 0], [9, 9, 2], [11, 11, 10]))
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(ValueError, match=r"slot 1 of tree 1 goes to 2; allowed: -1, or a slot that is not higher"):
        evaluator.remap(np.array([[0, 1], [0, 2]]), 5)
    with pytest.raises(ValueError, match="old_slots = 13"):
        evaluator.remap(np.full((2, 13), -1), 5)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("world_model.cell.weight_hh", r"world_model.cell.weight_hh: \[3, 2\] = nan; allowed: finite numbers"),
        ("critic.weight_LD", r"critic.weight_LD, layer 3: \[3, 2\] = nan"),
        ("lm_head.weight", r"backbone.embedding.weight: \[3, 2\] = nan"),
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, message: str) -> None:
    model = random_model(n_layer=4)
    model.get_parameter(name)[3, 2] = float("nan")
    with pytest.raises(ValueError, match=message):
        packed(model)


def test_weights_of_another_type_or_shape_are_named() -> None:
    model = random_model()
    model.critic.weight_LD = torch.nn.Parameter(torch.zeros(2, 17))
    with pytest.raises(ValueError, match=r"critic.weight_LD has shape \(2, 17\); allowed: \(2, 16\)"):
        packed(model)
    with pytest.raises(ValueError, match=r"backbone.embedding.weight is torch.bfloat16 on cpu; allowed: torch.float32"):
        packed(random_model().bfloat16())
    weightless = random_model()
    weightless.fusion.logits_L.fill_(-torch.inf)
    with pytest.raises(ValueError, match=r"fusion.logits_L = .*; allowed: at least one finite"):
        packed(weightless)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_snapshot_that_is_not_finite_is_named(small: CRSM, value: float) -> None:
    network, snapshot = packed(small), random_snapshot(small, 3)
    memory_BMHPN = snapshot.memory_BMHPN.clone().numpy()
    memory = network.memory(memory_BMHPN)
    memory_BMHPN[2, 1, 3, 4, 6] = value
    with pytest.raises(ValueError, match="memory: snapshot 2, read layer 1 holds NaN or infinity"):
        network.memory(memory_BMHPN)
    found = network.project(memory, snapshot.hidden_BLD.numpy(), random_tokens(small, 3).numpy(), 0)
    for name, text in (("latent_FG", "tree 1"), ("hidden_FLD", "tree 1, layer 1")):
        broken = getattr(found, name).copy()
        broken[1, -1] = value
        with pytest.raises(ValueError, match=f"{name}: {text} holds NaN or infinity; allowed: finite numbers"):
            network.evaluator(memory, found._replace(**{name: broken}), 4, [])


def test_what_overflows_is_no_evaluation_and_no_crash() -> None:
    model = random_model(tie_embeddings=False)
    model.lm_head.weight[:] = 3e38
    _, (actions_BA, logits_BA, _) = evaluator_of(model)
    assert np.isnan(logits_BA).all() and ((actions_BA >= 0) & (actions_BA < 31)).all()


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (([2], [0], [3], [1]), "tree_R = 2"),
        (([0], [9], [3], [1]), "parent = 9; allowed: 0 to 8"),
        (([0], [-1], [3], [1]), "parent = -1"),
        (([0], [0], [53], [1]), "token = 53; allowed: 0 to 52"),
        (([0], [0], [-1], [1]), "token = -1"),
        (([0], [0], [3], [9]), "node = 9; allowed: 0 to 8"),
    ],
)
def test_leaves_that_are_not_there_are_refused(small: CRSM, leaf: tuple[list[int], ...], message: str) -> None:
    evaluator, _ = evaluator_of(small, 2)
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate_leaves(*rows(*leaf))


def test_arguments_of_the_wrong_type_or_shape_are_refused(small: CRSM) -> None:
    network, snapshot, known_B = packed(small), random_snapshot(small, 2), random_tokens(small, 2).numpy()
    memory_BMHPN, hidden_BLD = snapshot.memory_BMHPN.numpy(), snapshot.hidden_BLD.numpy()
    memory = network.memory(memory_BMHPN)
    with pytest.raises(ValueError, match="memory_BMHPN: wrong dtype; allowed: float32"):
        network.memory(memory_BMHPN.astype(np.float64))
    with pytest.raises(ValueError, match="memory_BMHPN: wrong shape"):
        network.memory(memory_BMHPN[:, :, :1])
    with pytest.raises(ValueError, match=r"hidden_BLD has shape \(1, 2, 10\); allowed: \(2, 2, 10\)"):
        network.project(memory, hidden_BLD[:1], known_B, 1)
    with pytest.raises(ValueError, match=r"known_B\[1\] = 53; allowed: 0 to 52"):
        network.project(memory, hidden_BLD, np.array([0, 53]), 1)
    with pytest.raises(ValueError, match="lag = -1, hypotheses = 1"):
        network.project(memory, hidden_BLD, known_B, -1)
    found = network.project(memory, hidden_BLD, known_B, 0)
    with pytest.raises(ValueError, match=r"memory_F\[1\] = 2; allowed: 0 to 1"):
        network.evaluator(memory, found._replace(memory_F=np.array([0, 2])), 4, [])
    with pytest.raises(ValueError, match="num_actions = 0; allowed: at least 1"):
        network.evaluator(memory, found, 0, [])
    with pytest.raises(ValueError, match="memory: of other sizes"):
        packed(random_model()).project(memory, hidden_BLD, known_B, 1)
    # Views with gaps are taken: they are made contiguous first.
    wide = np.concatenate([hidden_BLD, hidden_BLD], axis=2)[:, :, :10]
    np.testing.assert_array_equal(network.project(memory, wide, known_B, 0).hidden_FLD, found.hidden_FLD)


def test_packed_weights_know_when_the_model_has_moved_on() -> None:
    model = random_model()
    network = packed(model)
    assert network.is_current(model, model.world_model)
    assert not network.is_current(random_model(), model.world_model)
    assert not network.is_current(model, another_world_model(model))
    with torch.no_grad():
        model.critic.bias_L += 1.0
    assert not network.is_current(model, model.world_model)
    network = packed(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert not network.is_current(model, model.world_model)
