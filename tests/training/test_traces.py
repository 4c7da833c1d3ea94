"""Traces: what is kept at a root is what running the prefix by hand leaves there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from crsm.data import AttemptGroup
from crsm.training.traces import Texts, repeat_rows, trace_backbone
from crsm.types import concat_states
from tests.fixtures import random_state, tiny_checkpoint
from tests.training.texts import equal_group, prompt_of, ragged_group, whole_texts

groups = pytest.mark.parametrize("make", [equal_group, ragged_group])


@groups
def test_prompts_end_together_and_with_their_answers_are_the_texts(make: Callable[[], AttemptGroup]) -> None:
    group = make()
    texts = Texts.from_group(group, world=1)
    assert texts.prompt_BT.shape[1] == int(group.prompt_lengths_B.max())
    for row, text in enumerate(whole_texts(group)):
        answer = texts.answer_BT[row, : int(texts.length_B[row])]
        assert [*prompt_of(texts, row).tolist(), *answer.tolist()] == text
    assert texts.problem_B.tolist() == [0, 0, 1, 1] and texts.outcome_B.tolist() == [False, True, True, False]
    assert (texts.segment_BT is None) is group.equal_prompts


def test_the_share_is_the_weight_of_this_workers_part() -> None:
    group = equal_group()
    part = group.rows(slice(0, 1))
    assert Texts.from_group(group, world=1).share == 1.0
    assert Texts.from_group(part, world=2).share == 2 * 1 / 2


@groups
@pytest.mark.parametrize("roots", [(0,), (0, 1, 2, 3, 4), (1, 3), (2,), (4, 5)])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_what_is_kept_at_a_root_is_the_state_of_its_prefix(
    make: Callable[[], AttemptGroup], roots: tuple[int, ...], layers: tuple[int, ...]
) -> None:
    backbone = tiny_checkpoint().model.backbone
    texts = Texts.from_group(make(), world=1)
    trace = trace_backbone(backbone, texts, roots, layers)
    sequences, tokens = texts.answer_BT.shape
    assert trace.hidden_SBLD.shape == (tokens + 1, sequences, 2, 16) and trace.roots == roots
    for row in range(sequences):
        prompt = prompt_of(texts, row)
        hidden, _ = backbone(torch.cat([prompt, texts.answer_BT[row]])[None])
        np.testing.assert_allclose(trace.hidden_SBLD[:, row], hidden[0, len(prompt) - 1 :], atol=1e-4)
        for place, root in enumerate(roots):
            _, state = backbone(torch.cat([prompt, texts.answer_BT[row, :root]])[None])
            for index, layer in enumerate(state.layers):
                kept = trace.states_R[place].layers[index]
                np.testing.assert_allclose(kept.ssm_BHPN[row], layer.ssm_BHPN[0], atol=1e-4)
                np.testing.assert_allclose(kept.conv_BCK[row], layer.conv_BCK[0], atol=1e-4)
            for slot, index in enumerate(layers):
                np.testing.assert_array_equal(
                    trace.memory_RBMHPN[place, row, slot], trace.states_R[place].layers[index].ssm_BHPN[row]
                )


def test_padding_before_a_prompt_leaves_nothing_behind() -> None:
    """A problem's part of a mixed group is what the problem gives by itself."""
    backbone = tiny_checkpoint().model.backbone
    group = ragged_group()
    trace = trace_backbone(backbone, Texts.from_group(group, world=1), (0, 2), (0,))
    for problem in range(2):
        alone = group.rows(slice(problem, problem + 1))
        alone = dataclasses.replace(alone, prompts_BT=alone.prompts_BT[:, : alone.prompt_lengths_B[0]])
        alone_trace = trace_backbone(backbone, Texts.from_group(alone, world=1), (0, 2), (0,))
        rows = slice(2 * problem, 2 * problem + 2)
        np.testing.assert_allclose(trace.hidden_SBLD[:, rows], alone_trace.hidden_SBLD, atol=1e-5)
        np.testing.assert_allclose(trace.memory_RBMHPN[:, rows], alone_trace.memory_RBMHPN, atol=1e-5)


def test_rows_are_repeated_in_neighbourhood() -> None:
    checkpoint = tiny_checkpoint()
    two = concat_states([random_state(checkpoint), random_state(checkpoint, (9, 9))])
    for layer, before in zip(repeat_rows(two, 2).layers, two.layers, strict=True):
        assert torch.equal(layer.ssm_BHPN, before.ssm_BHPN[[0, 0, 1, 1]])
        assert torch.equal(layer.conv_BCK, before.conv_BCK[[0, 0, 1, 1]])


def test_a_trace_carries_no_gradients() -> None:
    model = tiny_checkpoint().model.requires_grad_(True)
    trace = trace_backbone(model.backbone, Texts.from_group(equal_group(), world=1), (0, 1), (0,))
    assert not trace.hidden_SBLD.requires_grad and not trace.memory_RBMHPN.requires_grad
