"""Numbers as they travel: what bf16 holds survives, the rest is rounded to nearest even, and plans follow."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crsm.delta_buffer import Fault, check_plan
from crsm.engine import Engine
from crsm.event_log import EventLog, read_log
from crsm.reasoning import Deliberator
from crsm.types import PlanRequest
from crsm.wire import from_wire, is_finite, plan_shapes, request_shapes, to_wire, wire_of
from tests.actors.helpers import generations, make_requests
from tests.fixtures import FakePlanners, a_request, make_plan, tiny_checkpoint

FLOATS = arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


def floats(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def rounded(request: PlanRequest) -> PlanRequest:
    """The request with its snapshot in bf16."""
    return dataclasses.replace(
        request, hidden_LD=to_wire(request.hidden_LD, "bf16"), ssm_LHPN=to_wire(request.ssm_LHPN, "bf16")
    )


def test_all_numbers_of_bf16_come_back_bit_for_bit() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    numbers = from_wire(every)
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(to_wire(numbers, "bf16")[finite], every[finite])
    np.testing.assert_array_equal(numbers[finite].view(np.uint32) >> 16, every[finite])
    np.testing.assert_array_equal(np.isnan(from_wire(to_wire(numbers, "bf16"))), np.isnan(numbers))
    np.testing.assert_array_equal(np.isinf(from_wire(to_wire(numbers, "bf16"))), np.isinf(numbers))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0x3F808000, 0x3F80),  # half way, the lower is even
        (0x3F818000, 0x3F82),  # half way, the upper is even
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0x3FFF8000, 0x4000),  # the carry reaches the exponent
        (0xBF818000, 0xBF82),
        (0x00008001, 0x0001),  # denormal
        (0x7F7FFFFF, 0x7F80),  # above the largest: infinity
    ],
)
def test_rounding_is_to_nearest_and_ties_go_to_even(number: int, expected: int) -> None:
    assert to_wire(np.repeat(floats(number), 40), "bf16").tolist() == [expected] * 40


@given(FLOATS)
def test_rounding_is_that_of_the_definition(array: np.ndarray) -> None:
    bits = array.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    found, nan = to_wire(array, "bf16"), np.isnan(array)
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    assert np.isnan(from_wire(found[nan])).all()
    assert is_finite(array) == np.isfinite(array).all()
    assert is_finite(found) == np.isfinite(from_wire(found)).all()


def test_fp32_passes_uncopied_and_tensors_travel_like_arrays() -> None:
    array = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6)
    assert to_wire(array) is array and from_wire(array) is array
    for numbers in (torch.tensor(array).bfloat16(), torch.tensor(array), array, array.astype(np.float64)):
        assert to_wire(numbers, "fp32").dtype == np.float32
        np.testing.assert_array_equal(to_wire(numbers, "bf16"), to_wire(array, "bf16"))
    across = to_wire(torch.tensor(array).T, "bf16")
    assert across.shape == (6, 5) and across.flags.c_contiguous and wire_of(across) == "bf16"
    array.setflags(write=False)
    np.testing.assert_array_equal(to_wire(array, "bf16"), across.T)
    with pytest.raises(ValueError, match="wire = 'fp8'; allowed: fp32, bf16"):
        to_wire(array, "fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["python", "auto"])
def test_a_bf16_request_is_planned_like_the_rounded_snapshot(engine: str) -> None:
    checkpoint = tiny_checkpoint()
    deliberator = Deliberator.from_checkpoint(checkpoint, engine=engine)  # type: ignore[arg-type]
    requests = [rounded(request) for request in make_requests(checkpoint, 3)]
    widened = [
        dataclasses.replace(request, hidden_LD=from_wire(request.hidden_LD), ssm_LHPN=from_wire(request.ssm_LHPN))
        for request in requests
    ]
    sizes, rank = checkpoint.config.model.backbone, checkpoint.config.model.writer.rank
    for plan, expected in zip(deliberator(requests), deliberator(widened), strict=True):
        assert (plan.line, plan.assumed) == (expected.line, expected.assumed)
        for name in ("value_root_L", "value_plan_L", "confidence_L", "policy_tokens_A", "policy_probs_A"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(expected, name))
        for name in ("write_u_LRE", "write_b_LRN"):
            np.testing.assert_array_equal(getattr(plan, name), to_wire(getattr(expected, name), "bf16"))
        assert check_plan(plan, sizes, rank) is None
        assert plan.num_bytes < expected.num_bytes


def test_infinity_is_found_in_a_bf16_request_and_in_a_bf16_plan() -> None:
    checkpoint = tiny_checkpoint()
    (request,) = make_requests(checkpoint, 1)
    hidden = to_wire(request.hidden_LD, "bf16").copy()
    hidden[0, 0] = 0x7F80
    with pytest.raises(ValueError, match="request 0: hidden_LD holds NaN or infinity"):
        Deliberator.from_checkpoint(checkpoint)([dataclasses.replace(request, hidden_LD=hidden)])
    plan = make_plan(a_request(), checkpoint)
    write = to_wire(plan.write_u_LRE, "bf16").copy()
    sizes = checkpoint.config.model.backbone
    assert check_plan(dataclasses.replace(plan, write_u_LRE=write), sizes, 1) is None
    write[0, 0, 0] = 0xFFC0
    malformed = check_plan(dataclasses.replace(plan, write_u_LRE=write), sizes, 1)
    assert malformed == (Fault.NOT_FINITE, "write_u_LRE holds NaN or infinity")
    values = np.zeros(sizes.n_layer, np.uint16)
    assert "confidence_L is uint16" in str(check_plan(dataclasses.replace(plan, confidence_L=values), sizes, 1))


def test_a_bf16_write_steers_like_its_widened_self_and_is_replayed(tmp_path: object) -> None:
    checkpoint = tiny_checkpoint()

    def answer(as_bf16: bool, request: PlanRequest) -> list[object]:
        plan = make_plan(request, checkpoint, assumed=(), seed=1)
        writes = {name: to_wire(getattr(plan, name), "bf16") for name in ("write_u_LRE", "write_b_LRN")}
        kept = {name: write if as_bf16 else from_wire(write) for name, write in writes.items()}
        return [dataclasses.replace(plan, line=(), confidence_L=np.ones(2, np.float32), **kept)]

    said = []
    for as_bf16 in (True, False):
        path = tmp_path / f"{as_bf16}.jsonl"  # type: ignore[operator]
        with open(path, "w") as file:
            planners = FakePlanners(lambda request, as_bf16=as_bf16: answer(as_bf16, request))  # type: ignore[misc]
            engine = Engine(checkpoint, planners, event_log=EventLog(file))
            said.append(engine.generate_all(generations(lag=0)))
        assert engine.metrics.injections > 0
        logged = [injection for generation in read_log(path) for injection in generation.injections.values()]
        assert {wire_of(injection.plan.write_u_LRE) for injection in logged} == {"bf16" if as_bf16 else "fp32"}
    assert said[0] == said[1] != Engine(checkpoint).generate_all(generations(lag=0))


def test_the_shapes_are_those_of_real_messages() -> None:
    checkpoint = tiny_checkpoint()
    (request,) = make_requests(checkpoint, 1)
    (plan,) = Deliberator.from_checkpoint(checkpoint)([request])
    for wire, message in (("fp32", request), ("bf16", rounded(request))):
        shapes = request_shapes(checkpoint.config.model)
        assert {name: getattr(message, name).shape for name in shapes} == {n: s.shape for n, s in shapes.items()}
        assert sum(shape.num_bytes(wire) for shape in shapes.values()) == message.num_bytes  # type: ignore[arg-type]
    shapes = plan_shapes(checkpoint.config.model, len(plan.policy_tokens_A))
    assert {name: getattr(plan, name).shape for name in shapes} == {name: s.shape for name, s in shapes.items()}
    assert sum(shape.num_bytes("fp32") for shape in shapes.values()) == plan.num_bytes
    assert request_shapes(checkpoint.config.model, [1], conv=True)["ssm_LHPN"].shape[0] == 1
