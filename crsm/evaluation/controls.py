"""The controls with which the claim stands or falls: planners that answer wrongly on purpose, or perfectly.

Each has the planners' protocol and stands between the engine and real planners (or in their place), so that a control
runs through the very same loop as System 2 itself.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from crsm.model import CRSM
from crsm.plan_writer import Write, random_write_like
from crsm.planners import Arrivals, Planners
from crsm.types import Plan, PlanRequest
from crsm.wire import from_wire

Alter = Callable[[list[Plan]], list[Plan]]


class AlteredPlanners:
    """Real planners whose plans are altered before the engine sees them; inline planners only (one batch a step)."""

    def __init__(self, inner: Planners, alter: Alter) -> None:
        self._inner, self._alter = inner, alter

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self._inner.submit(requests)

    def room(self) -> int | None:
        return self._inner.room()

    def soonest(self) -> float:
        return self._inner.soonest()

    def poll(self) -> Arrivals:
        return self._altered(self._inner.poll())

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self._altered(self._inner.wait(request_ids))

    def close(self) -> None:
        self._inner.close()

    def _altered(self, arrivals: Arrivals) -> Arrivals:
        return Arrivals(self._alter(arrivals.plans), arrivals.lost, arrivals.shed)


def random_write(seed: int) -> Alter:
    """Every write replaced by one of equal norm in a random direction."""
    generator = torch.Generator().manual_seed(seed)

    def alter(plans: list[Plan]) -> list[Plan]:
        altered = []
        for plan in plans:
            write = Write(torch.tensor(from_wire(plan.write_u_LRE)), torch.tensor(from_wire(plan.write_b_LRN)))
            random = random_write_like(write, generator)
            altered.append(
                dataclasses.replace(plan, write_u_LRE=random.u_BLRE.numpy(), write_b_LRN=random.b_BLRN.numpy())
            )
        return altered

    return alter


def other_problem(plans: list[Plan]) -> list[Plan]:
    """Every generation gets the plan (line, write, gate, policy) made for another one, at the same position if there is
    any; where nobody else was planned for, none."""
    at_position: dict[int, dict[str, Plan]] = defaultdict(dict)
    for plan in plans:
        at_position[plan.position].setdefault(plan.generation_id, plan)
    altered = []
    for index, plan in enumerate(plans):
        names = list(at_position[plan.position])
        # The neighbour in the batch: a permutation, so that no plan is handed to all.
        neighbour = at_position[plan.position][names[names.index(plan.generation_id) - 1]]
        around = (neighbour, *(plans[index - back] for back in range(1, len(plans))))
        other = next((other for other in around if _problem_of(other) != _problem_of(plan)), None)
        altered.append(_shut(plan) if other is None else _with_content_of(plan, other))
    return altered


def _problem_of(plan: Plan) -> str:
    """Generations of one problem are called ``problem/…``."""
    return plan.generation_id.partition("/")[0]


def time_shifted(shift: int) -> Alter:
    """Every generation gets the plan that was made for it ``shift`` positions before; at first, none."""
    made: dict[tuple[str, int], Plan] = {}

    def alter(plans: list[Plan]) -> list[Plan]:
        altered = []
        for plan in plans:
            made[plan.generation_id, plan.position] = plan
            former = made.pop((plan.generation_id, plan.position - shift), None)
            if former is None:
                altered.append(_shut(plan))
            else:
                altered.append(_with_content_of(plan, former))
        return altered

    return alter


def silent_tokens(plans: list[Plan]) -> list[Plan]:
    """The plan's next token is what the generation says: the backbone really steps along the plan.

    On the manifold of states that tokens can reach: the upper bound of what a write of this plan could do. To be used
    with the channel ``policy``; plans with a shut gate stay shut.
    """
    altered = []
    for plan in plans:
        said = plan.line[:1] or (0,)
        altered.append(
            dataclasses.replace(
                plan,
                confidence_L=np.full_like(plan.confidence_L, float(plan.confidence_L.any() and bool(plan.line))),
                policy_tokens_A=np.array(said, dtype=np.int64),
                policy_probs_A=np.ones(1, dtype=np.float32),
            )
        )
    return altered


def _shut(plan: Plan) -> Plan:
    return dataclasses.replace(plan, confidence_L=np.zeros_like(plan.confidence_L))


def _with_content_of(plan: Plan, source: Plan) -> Plan:
    """``plan`` with what ``source`` planned; it keeps its own address and assumptions, so that it is not refused."""
    names = ("line", "value_root_L", "value_plan_L", "uncertainty", "confidence_L", "write_u_LRE", "write_b_LRN")
    policy = ("policy_tokens_A", "policy_probs_A")
    return dataclasses.replace(plan, **{name: getattr(source, name) for name in (*names, *policy)})


class OraclePlanners:
    """Plans that are the solution itself, written by the model's own writer with every gate open."""

    def __init__(self, model: CRSM, solutions: Mapping[str, tuple[int, Sequence[int]]], plan_length: int) -> None:
        """
        Args:
            model: its writer is used.
            solutions: by generation id, the position of the first answer token, and the answer's tokens.
            plan_length: tokens of a plan.
        """
        self._model, self._solutions, self._plan_length = model, solutions, plan_length
        self._plans: list[Plan] = []

    @torch.inference_mode()
    def submit(self, requests: Sequence[PlanRequest]) -> None:
        layers = self._model.config.model.backbone.n_layer
        for request in requests:
            first, answer = self._solutions[request.generation_id]
            assumed = answer[request.position + 1 - first : request.target + 1 - first]
            line = answer[request.target + 1 - first :][: self._plan_length]
            # Past the solution's end there is nothing to plan: a plan that says so, with shut gates.
            assumed = (*assumed, *(0,) * (request.target - request.position - len(assumed)))
            write = self._model.writer(torch.tensor([list(line) or [0]]), torch.tensor([max(1, len(line))]))
            self._plans.append(
                Plan(
                    request_id=request.request_id,
                    generation_id=request.generation_id,
                    position=request.position,
                    target=request.target,
                    assumed=tuple(assumed),
                    line=tuple(line),
                    value_root_L=np.zeros(layers, np.float32),
                    value_plan_L=np.ones(layers, np.float32),
                    uncertainty=0.0,
                    confidence_L=np.full(layers, float(bool(line)), np.float32),
                    write_u_LRE=write.u_BLRE[0].numpy(),
                    write_b_LRN=write.b_BLRN[0].numpy(),
                    policy_tokens_A=np.array(line[:1] or (0,), dtype=np.int64),
                    policy_probs_A=np.ones(1, np.float32),
                    planner_id="oracle",
                    model_version=request.model_version,
                )
            )

    def room(self) -> int | None:
        return None

    def soonest(self) -> float:
        return 0.0

    def poll(self) -> Arrivals:
        plans, self._plans = self._plans, []
        return Arrivals(plans)

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self.poll()

    def close(self) -> None:
        self._plans.clear()
