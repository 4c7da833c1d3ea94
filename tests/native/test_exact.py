"""The backbone as its own world model in C++ against its definition in PyTorch, and what only it promises."""

from __future__ import annotations

import functools
import gc
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
from crsm.latent_dynamics import ExactDynamics, Snapshot
from crsm.model import CRSM, load_checkpoint
from crsm.native.exact import ExactNetwork, unfit
from crsm.reasoning import NetworkEvaluator, project
from crsm.search import Evaluation
from crsm.search.native import PythonView
from tests.native.latent_models import random_model, random_tokens

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native core: {native.MISSING}")

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}

SHAPES: dict[str, dict[str, Any]] = {
    "even": {},
    "odd widths": {"d_model": 10, "headdim": 5, "d_state": 7, "vocab_size": 53},
    "one layer": {"n_layer": 1, "vocab_size": 3},
    "a short window": {"d_conv": 2},
    "many heads": {"d_model": 40, "headdim": 4, "d_state": 16, "tie_embeddings": False},
    "layers too large for a cache": {"d_model": 192, "headdim": 64, "d_state": 32},
    "a large vocabulary": {"vocab_size": 4500},
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """PyTorch's products are small here; threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(name: str) -> CRSM:
    return load_checkpoint("nano").model if name == "nano" else random_model(**SHAPES[name])


@functools.cache
def network_of(name: str) -> ExactNetwork:
    return ExactNetwork(model_of(name))


@pytest.fixture(scope="module", params=[*SHAPES, "nano"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def snapshot_of(model: CRSM, count: int, seed: int = 0) -> Snapshot:
    sizes = model.config.model.backbone
    generator = torch.Generator().manual_seed(seed)
    state = (count, sizes.n_layer, sizes.n_heads, sizes.headdim, sizes.d_state)
    window = (count, sizes.n_layer, sizes.conv_channels, sizes.d_conv - 1)
    hidden = (count, sizes.n_layer, sizes.d_model)
    return Snapshot(*(torch.randn(shape, generator=generator) for shape in (hidden, state, window)))


def ahead_of(name: str, count: int, lag: int = 1, hypotheses: int = 1, threads: int = 0) -> Any:
    """Projected futures of random snapshots."""
    snapshot, known_B = snapshot_of(model_of(name), count), random_tokens(model_of(name), count).numpy()
    assert snapshot.conv_BLCK is not None
    arrays = (snapshot.memory_BMHPN.numpy(), snapshot.conv_BLCK.numpy(), snapshot.hidden_BLD.numpy())
    return network_of(name).project(*arrays, known_B, lag, hypotheses, threads)


def evaluator_of(name: str, count: int = 5, *, actions: int = 4, slots: int = 9, threads: int = 0) -> Any:
    """A native evaluator whose roots are evaluated, and their evaluations. Tokens 1 and 2 end the text."""
    evaluator = network_of(name).evaluator(ahead_of(name, count), actions, [1, 2], threads)
    return evaluator, evaluator.evaluate_roots(slots)


def rows(*columns: Any) -> list[np.ndarray]:
    return [np.array(column, np.int64) for column in columns]


def assert_best_of(found: Evaluation, everything: Evaluation) -> None:
    """The best of all tokens, up to rounding: neighbours that are equally likely may have changed places."""
    actions = found.actions_BA.shape[1]
    log_probs_BV = np.empty_like(everything.prior_logits_BA)
    np.put_along_axis(log_probs_BV, everything.actions_BA, everything.prior_logits_BA, axis=1)
    np.testing.assert_allclose(found.prior_logits_BA, everything.prior_logits_BA[:, :actions], **CLOSE)
    np.testing.assert_allclose(
        found.prior_logits_BA, np.take_along_axis(log_probs_BV, found.actions_BA, axis=1), **CLOSE
    )
    np.testing.assert_allclose(found.values_BL, everything.values_BL, **CLOSE)


# Against PyTorch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lag", "hypotheses"), [(0, 1), (0, 3), (1, 1), (3, 1), (3, 3), (2, 40)])
@torch.inference_mode()
def test_the_projection_is_the_one_in_pytorch(name: str, lag: int, hypotheses: int) -> None:
    model = model_of(name)
    expected = project(
        model, ExactDynamics(model.backbone), snapshot_of(model, 4), random_tokens(model, 4), lag, hypotheses
    )
    found = ahead_of(name, 4, lag, hypotheses)
    np.testing.assert_array_equal(found.assumed_FT, expected.assumed_FT)
    np.testing.assert_allclose(found.hidden_FLD, expected.hidden_FLD, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_evaluator_is_the_one_in_pytorch(name: str) -> None:
    """A tree of branches of up to twelve tokens, ends among them, with some trees at rest."""
    model, count, slots = model_of(name), 5, 16
    vocabulary = model.config.model.backbone.vocab_size
    expected = project(model, ExactDynamics(model.backbone), snapshot_of(model, count), random_tokens(model, count), 1)
    reference = NetworkEvaluator(model, ExactDynamics(model.backbone), expected, vocabulary, slots, (1, 2))
    view = PythonView(network_of(name).evaluator(ahead_of(name, count), 6, (1, 2)), slots)
    assert (view.num_trees, view.num_actions, view.num_layers) == (count, min(6, vocabulary), reference.num_layers)
    assert_best_of(view.root(), reference.root())
    active_B = np.array([True, True, False, True, True])
    parents = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 5, 0, 13]
    for slot, parent in enumerate(parents, start=1):
        token_B = np.array([1, 2, 0, 1, 2]) if slot == 4 else random_tokens(model, count, slot).numpy()
        arguments = (np.where(active_B, parent, 0), token_B, np.full(count, slot), active_B)
        mine, theirs = view.expand(*arguments), reference.expand(*arguments)
        fields = ((e.actions_BA, e.prior_logits_BA, e.values_BL) for e in (mine, theirs))
        assert_best_of(*(Evaluation(*(array[active_B] for array in each)) for each in fields))


@torch.inference_mode()
def test_a_state_that_is_forgotten_at_once_leaves_no_number_undefined() -> None:
    """Decays of e^-80 a token: their products vanish, and no quotient of them is taken."""
    model = random_model()
    for layer in model.backbone.layers:
        layer.mixer.A_log.fill_(np.log(80.0))
        layer.mixer.dt_bias.fill_(2.0)
    snapshot, known_B = snapshot_of(model, 3), random_tokens(model, 3)
    arrays = (snapshot.memory_BMHPN.numpy(), snapshot.conv_BLCK.numpy(), snapshot.hidden_BLD.numpy())  # type: ignore[union-attr]
    found = ExactNetwork(model).project(*arrays, known_B.numpy(), 6)
    expected = project(model, ExactDynamics(model.backbone), snapshot, known_B, 6)
    np.testing.assert_array_equal(found.assumed_FT, expected.assumed_FT)
    np.testing.assert_allclose(found.hidden_FLD, expected.hidden_FLD, rtol=1e-4, atol=1e-4)


# Guarantees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd widths", "layers too large for a cache"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_bit_by_bit_what_it_is_alone(name: str, threads: int) -> None:
    """More rows than are computed between two looks at a cancelled search, too."""
    count = 100
    evaluator, roots = evaluator_of(name, count, threads=threads)
    leaves = [*rows(range(count), [0] * count), random_tokens(model_of(name), count).numpy(), *rows([1] * count)]
    together = evaluator.evaluate_leaves(*leaves)
    alone, alone_roots = evaluator_of(name, count, threads=1)
    for mine, other in zip(roots, alone_roots, strict=True):
        np.testing.assert_array_equal(mine, other)
    for row in range(0, count, 9):
        single = alone.evaluate_leaves(*(column[row : row + 1] for column in leaves))
        for whole, one in zip(together, single, strict=True):
            np.testing.assert_array_equal(whole[row], one[0])


@settings(max_examples=30, deadline=None)
@given(trees=st.lists(st.integers(0, 6), min_size=1, max_size=20), threads=st.integers(1, 3))
def test_any_leaves_in_any_order_give_the_same_bits(trees: list[int], threads: int) -> None:
    """Several leaves of a tree in one call, too."""
    tokens = [(7 * row + tree) % 53 for row, tree in enumerate(trees)]
    nodes = list(range(1, len(trees) + 1))
    evaluator, _ = evaluator_of("odd widths", 7, slots=22, threads=threads)
    together = evaluator.evaluate_leaves(*rows(trees, [0] * len(trees), tokens, nodes))
    for row, (tree, token) in enumerate(zip(trees, tokens, strict=True)):
        single = evaluator.evaluate_leaves(*rows([tree], [0], [token], [21]))
        for whole, one in zip(together, single, strict=True):
            np.testing.assert_array_equal(whole[row], one[0])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_computes_it(isa: str) -> None:
    if native.require().isa() == isa:
        pytest.skip("that is what the other tests run with")
    names = "(pytorch or bit_by_bit or forgotten) and not nano"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__]
    environment = {**os.environ, "CRSM_NATIVE_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_terminal_token_takes_over_the_value_of_the_position_it_ends() -> None:
    evaluator, (_, _, root_BL) = evaluator_of("odd widths")
    _, _, moved_RL = evaluator.evaluate_leaves(*rows([3], [0], [9], [1]))
    assert not np.array_equal(moved_RL[0], root_BL[3])
    _, _, ended_RL = evaluator.evaluate_leaves(*rows([3, 3, 4], [0, 1, 0], [1, 2, 2], [2, 3, 2]))
    np.testing.assert_array_equal(ended_RL, [root_BL[3], moved_RL[0], root_BL[4]])


def test_searches_of_one_projection_do_not_see_each_other() -> None:
    ahead = ahead_of("even", 2)
    first, second = (network_of("even").evaluator(ahead, 4, []) for _ in range(2))
    for evaluator in (first, second):
        evaluator.evaluate_roots(5)
    first.evaluate_leaves(*rows([0, 1], [0, 0], [3, 4], [1, 1]))
    second.evaluate_leaves(*rows([0, 1], [0, 0], [5, 6], [1, 1]))
    found = first.evaluate_leaves(*rows([0, 1], [1, 1], [7, 8], [2, 2]))
    alone = network_of("even").evaluator(ahead, 4, [])
    alone.evaluate_roots(5)
    alone.evaluate_leaves(*rows([0, 1], [0, 0], [3, 4], [1, 1]))
    for mine, other in zip(found, alone.evaluate_leaves(*rows([0, 1], [1, 1], [7, 8], [2, 2])), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_an_evaluator_keeps_alive_what_it_reads() -> None:
    """Model, network, futures and snapshots may be dropped while a search runs."""
    expected, _ = evaluator_of("even")
    wanted = expected.evaluate_leaves(*rows([1], [0], [9], [1]))
    model = random_model()
    snapshot, known_B = snapshot_of(model, 5), random_tokens(model, 5).numpy()
    arrays = [part.numpy().copy() for part in (snapshot.memory_BMHPN, snapshot.conv_BLCK, snapshot.hidden_BLD)]  # type: ignore[union-attr]
    network = ExactNetwork(model)
    evaluator = network.evaluator(network.project(*arrays, known_B, 1), 4, [1, 2])
    del model, snapshot, network, arrays
    gc.collect()
    evaluator.evaluate_roots(9)
    for mine, other in zip(evaluator.evaluate_leaves(*rows([1], [0], [9], [1])), wanted, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_node_takes_no_state() -> None:
    """nano: a layer's window, decays, dt·x and B, and the residual streams; a state has H·P·N numbers a layer."""
    sizes = model_of("nano").config.model.backbone
    evaluator, _ = evaluator_of("nano", 2)
    record = sizes.n_layer * (sizes.conv_channels * (sizes.d_conv - 1) + sizes.n_heads + sizes.d_inner + sizes.d_state)
    node = record + sizes.n_layer * sizes.d_model
    per_node = evaluator.bytes_per_tree(10) / 10 / 4
    assert node + sizes.n_layer <= per_node < node + sizes.n_layer + 16  # values, and up to a vector of padding


def test_changes_of_the_weights_are_noticed() -> None:
    model = random_model()
    network = ExactNetwork(model)
    assert network.is_current(model) and not network.is_current(random_model())
    model.backbone.layers[0].mixer.D += 1.0
    assert not network.is_current(model) and ExactNetwork(model).is_current(model)
    network = ExactNetwork(model)
    model.critic.bias_L -= 1.0
    assert not network.is_current(model)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_weights_that_cannot_be_packed_are_named() -> None:
    model = random_model()
    model.critic.weight_LD[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"critic.weight_LD holds nan; allowed: finite numbers"):
        ExactNetwork(model)
    assert unfit(random_model()) == ""
    assert unfit(random_model().double()) == "backbone.embedding.weight is torch.float64 on cpu"
    with pytest.raises(ValueError, match=r"embedding.weight has dtype torch.float64; allowed: torch.float32"):
        ExactNetwork(random_model().double())


@pytest.mark.parametrize(("place", "text"), [(0, "memory_BLHPN"), (1, "conv_BLCK"), (2, "hidden_BLD")])
def test_a_snapshot_that_is_not_finite_or_of_another_shape_is_named(place: int, text: str) -> None:
    snapshot = snapshot_of(model_of("odd widths"), 3)
    arrays = [part.numpy().copy() for part in (snapshot.memory_BMHPN, snapshot.conv_BLCK, snapshot.hidden_BLD)]  # type: ignore[union-attr]
    known_B = random_tokens(model_of("odd widths"), 3).numpy()
    arrays[place][2, 1].flat[-1] = float("inf")
    with pytest.raises(ValueError, match=f"{text}: snapshot 2, layer 1 holds NaN or infinity; allowed: finite numbers"):
        network_of("odd widths").project(*arrays, known_B, 1)
    arrays[place] = arrays[place][:, :1]
    with pytest.raises(ValueError, match=rf"{text} has shape \(3, 1, .*\); allowed: \(3, 2, "):
        network_of("odd widths").project(*arrays, known_B, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lag": -1}, "lag = -1, hypotheses = 1, snapshots = 3; allowed"),
        ({"hypotheses": 0}, "hypotheses = 0"),
        ({"known_B": np.array([0, 1, 53])}, r"known_B\[2\] = 53; allowed: 0 to 52"),
        ({"known_B": np.array([0.0, 1.0, 2.0])}, "known_B: wrong dtype; allowed: int64"),
    ],
)
def test_arguments_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    snapshot = snapshot_of(model_of("odd widths"), 3)
    arrays = [part.numpy() for part in (snapshot.memory_BMHPN, snapshot.conv_BLCK, snapshot.hidden_BLD)]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=message):
        network_of("odd widths").project(*arrays, **{"known_B": np.array([0, 1, 2]), "lag": 1} | changes)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (([0], [9], [3], [1]), "exact evaluator: parent = 9; allowed: 0 to 8"),
        (([0], [0], [53], [1]), "token = 53; allowed: 0 to 52"),
        (([0], [0], [3], [9]), "node = 9; allowed: 0 to 8"),
        (([0], [3], [3], [3]), "parent = 3, node = 3; allowed: a parent below its node"),
    ],
)
def test_leaves_that_are_not_there_are_named(leaf: tuple[list[int], ...], message: str) -> None:
    evaluator, _ = evaluator_of("odd widths", 2)
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate_leaves(*rows(*leaf))


def test_no_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="num_actions = 0; allowed: at least 1"):
        network_of("even").evaluator(ahead_of("even", 2), 0, [])
