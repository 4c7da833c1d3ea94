"""What a checkpoint is made of, how large it and its messages are, and what its training reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from crsm import native
from crsm.mamba_ssm import Mixer
from crsm.model import PARTS, Checkpoint
from crsm.types import Plan, PlanRequest


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes and figures as plain data.

    Returns:
        ``parts`` (parameters and bytes of each), ``bytes`` (state of a generation, request, plan), ``layers`` (fusion
        and consensus weights, slope and bias of the gates, per layer), ``fidelity`` (per task, a row per imagined
        step), and ``facts``.
    """
    model, config = checkpoint.model, checkpoint.config
    counts = model.num_parameters()
    width = model.backbone.embedding.weight.element_size()
    with torch.no_grad():
        fusion, consensus = model.fusion.weights_L.tolist(), model.critic.consensus_weights_L.tolist()
    return {
        "parts": {
            **{part: {"parameters": counts[part], "bytes": counts[part] * width} for part in PARTS},
            "together": {"parameters": sum(counts.values()), "bytes": sum(counts.values()) * width},
        },
        "bytes": {
            "state of a generation": model.backbone.initial_state(1).num_bytes,
            "request to a planner": _request(checkpoint).num_bytes,
            "plan": _plan(checkpoint).num_bytes,
        },
        "layers": {
            "fusion": fusion,
            "consensus": consensus,
            "gate_slope": model.gate.slope_L.tolist(),
            "gate_bias": model.gate.bias_L.tolist(),
        },
        "fidelity": _fidelity(checkpoint.report),
        "facts": {
            "vocabulary": f"{checkpoint.tokenizer.vocab_size} ({checkpoint.tokenizer.kind})",
            "tasks": ", ".join(task.name for task in config.tasks),
            "kernels": _kernels(checkpoint),
            "native core": native.describe(),
            "weights": checkpoint.weights_hash,
            "model version": checkpoint.model_version,
            "trust horizon": _or_unmeasured(checkpoint.trust_horizon),
            "uncertainty penalty": model.critic.uncertainty_penalty,
            "gates": _gates(checkpoint),
            **_measured(checkpoint.report),
        },
    }


def _request(checkpoint: Checkpoint) -> PlanRequest:
    sizes, world_model = checkpoint.config.model.backbone, checkpoint.model.planning_model()
    state = (len(world_model.read_layers), sizes.n_heads, sizes.headdim, sizes.d_state)
    conv = np.zeros((sizes.n_layer, sizes.conv_channels, sizes.d_conv - 1), np.float32)
    return PlanRequest(
        request_id=0,
        generation_id="",
        position=1,
        target=1,
        token=0,
        hidden_LD=np.zeros((sizes.n_layer, sizes.d_model), np.float32),
        ssm_LHPN=np.zeros(state, np.float32),
        conv_LCK=conv if world_model.needs_conv else None,
    )


def _plan(checkpoint: Checkpoint) -> Plan:
    sizes, rank = checkpoint.config.model.backbone, checkpoint.config.model.writer.rank
    per_layer = np.zeros(sizes.n_layer, np.float32)
    actions = checkpoint.config.search.num_actions
    return Plan(
        request_id=0,
        generation_id="",
        position=1,
        target=1,
        assumed=(),
        line=(),
        value_root_L=per_layer,
        value_plan_L=per_layer,
        uncertainty=0.0,
        confidence_L=per_layer,
        write_u_LRE=np.zeros((sizes.n_layer, rank, sizes.d_inner), np.float32),
        write_b_LRN=np.zeros((sizes.n_layer, rank, sizes.d_state), np.float32),
        policy_tokens_A=np.zeros(actions, np.int64),
        policy_probs_A=np.zeros(actions, np.float32),
    )


def _kernels(checkpoint: Checkpoint) -> str:
    """Names of the kernels that the layers run on."""
    mixers = [module for module in checkpoint.model.backbone.modules() if isinstance(module, Mixer)]
    return ", ".join(sorted({mixer.kernels.NAME for mixer in mixers}))


def _gates(checkpoint: Checkpoint) -> str:
    gate = checkpoint.model.gate
    if not gate.calibrated:
        reason = _find(checkpoint.report, "gates", "reason")
        return f"shut ({reason})" if reason else "shut (never calibrated)"
    return f"open from an advantage of {float(gate.threshold):.3f} on"


def _measured(report: Mapping[str, Any]) -> dict[str, str]:
    """The figures that decide about the gates, as far as the stages have reported them."""
    wanted = {
        "branch accuracy": ("stage_3", "branch_accuracy"),
        "gate calibration error": ("stage_4", "gates", "ece"),
        "gate AUC": ("stage_4", "gates", "auc"),
        "plans written": ("stage_4", "gates", "written"),
        "written plans that are right": ("stage_4", "gates", "written_right"),
    }
    return {name: _or_unmeasured(_find(report, *path)) for name, path in wanted.items()}


def _fidelity(report: Mapping[str, Any]) -> dict[str, list[dict[str, float | None]]]:
    table = _find(report, "fidelity") or {}
    return {task: [{key: _number(value) for key, value in row.items()} for row in rows] for task, rows in table.items()}


def _number(value: float | None) -> float | None:
    """None for what could not be measured, however the report writes it."""
    return None if value is None or math.isnan(value) else value


def _find(report: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of the report, or at the path's end anywhere in it: stages nest their parts differently."""
    node: Any = report
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    if node is not None:
        return node
    for value in report.values():
        if isinstance(value, Mapping):
            found = value.get(path[-1]) if path[-1] in value else _find(value, path[-1])
            if found is not None:
                return found
    return None


def _or_unmeasured(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
