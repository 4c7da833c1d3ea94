"""What a checkpoint is made of, how large it and its messages are, and what its training reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from crsm import native
from crsm.config import BackboneConfig, ModelConfig, SearchConfig
from crsm.mamba_ssm import Mixer
from crsm.model import PARTS, Checkpoint
from crsm.slots import Slots
from crsm.wire import WIRES, plan_shapes, request_shapes


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes and figures as plain data.

    Returns:
        ``parts`` (parameters and bytes of each), ``bytes`` (state of a generation, of one that runs with
        what is in force and remembered, and of all there may be; request and plan in fp32 and bf16),
        ``layers`` (fusion and consensus weights, slope and bias of the gates, per layer), ``fidelity`` (per task, a row
        per imagined step), and ``facts``.
    """
    model, config = checkpoint.model, checkpoint.config
    counts = model.num_parameters()
    width = model.backbone.embedding.weight.element_size()
    with torch.no_grad():
        fusion, consensus = model.fusion.weights_L.tolist(), model.critic.consensus_weights_L.tolist()
    generation = Slots.bytes_per_slot(config.model.backbone, config.deliberation.max_lag)
    return {
        "parts": {
            **{part: {"parameters": counts[part], "bytes": counts[part] * width} for part in PARTS},
            "together": {"parameters": sum(counts.values()), "bytes": sum(counts.values()) * width},
        },
        "bytes": {
            "state of a generation": model.backbone.initial_state(1).num_bytes,
            "running generation": generation,
            f"running generations, {config.engine.max_batch} at most": config.engine.max_batch * generation,
            **{
                f"{message}, {wire}": size
                for message, by_wire in _message_sizes(checkpoint).items()
                for wire, size in by_wire.items()
            },
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
            "tasks": ", ".join(task.label for task in config.tasks),
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


def _message_sizes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    config, world_model = checkpoint.config, checkpoint.model.planning_model()
    found = message_sizes(
        config.model, world_model.read_layers, num_actions=config.search.num_actions, conv=world_model.needs_conv
    )
    return {"request to a planner": found["request"], "plan": found["plan"]}


def message_sizes(
    model: ModelConfig,
    read_layers: Sequence[int] | None = None,
    *,
    num_actions: int = SearchConfig().num_actions,
    conv: bool = False,
) -> dict[str, dict[str, int]]:
    """Bytes of the arrays of a request and of a plan, by the kind that their numbers travel in.

    Args:
        model: sizes; nothing of this size is built.
        read_layers: layers whose SSM state is sent; None: those that the settings name.
        num_actions: root actions of the search.
        conv: with convolution states, as the exact world model needs them.
    """
    shapes = {"request": request_shapes(model, read_layers, conv=conv), "plan": plan_shapes(model, num_actions)}
    return {
        message: {wire: sum(array.num_bytes(wire) for array in arrays.values()) for wire in WIRES}
        for message, arrays in shapes.items()
    }


def public_message_sizes(name: str, model: ModelConfig, few: int = 4) -> dict[str, dict[str, dict[str, int]]]:
    """Sizes of the messages of a checkpoint beside those of public Mamba-2 models.

    Args:
        name: of the checkpoint.
        model: its sizes.
        few: how many layers a planner reads that does not read all.

    Returns:
        By model: ``state`` of a generation (fp32), ``request, all layers``, ``request, few layers``, and ``plan``, each
        by kind.
    """
    table = {}
    for title, config in {name: model, **PUBLIC}.items():
        sizes = config.backbone
        layers = range(sizes.n_layer)
        state = 4 * sizes.n_layer * (sizes.d_inner * sizes.d_state + sizes.conv_channels * (sizes.d_conv - 1))
        table[title] = {
            "state": {"fp32": state},
            "request, all layers": message_sizes(config, layers)["request"],
            f"request, {few} layers": message_sizes(config, layers[:few])["request"],
            "plan": message_sizes(config)["plan"],
        }
    return table


def _mamba2(d_model: int, n_layer: int) -> ModelConfig:
    sizes = BackboneConfig(vocab_size=50288, d_model=d_model, n_layer=n_layer, d_state=128, headdim=64, expand=2)
    return ModelConfig(backbone=sizes)


PUBLIC = {"mamba2-130m": _mamba2(768, 24), "mamba2-1.3b": _mamba2(2048, 48)}
"""Sizes of public checkpoints, with a plan writer of rank 1."""


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
