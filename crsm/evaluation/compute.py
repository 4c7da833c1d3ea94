"""What answers cost, in multiply-adds, from the shapes of the parameters.

A linear layer costs as many multiply-adds as its matrix has entries; so do a convolution (per position) and a GRU cell.
The state-space recurrence costs 3 · H·P·N: the state is decayed, the token's outer product is added, and the state is
read. Norms, activations, biases and products of vectors are left out: under 1 % here. An embedding is a look-up. A
token that the backbone imagines is counted as one that it says; the native search saves two thirds of its recurrence.

All figures are for one sequence and do not depend on the machine, the batch or how a kernel arranges its work.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from crsm.mamba_ssm import Layer
from crsm.model import CRSM


@dataclass(frozen=True, slots=True)
class Costs:
    """Multiply-adds of the parts of a model."""

    backbone: int
    """One token through all layers."""
    policy: int
    """The fused head: next-token logits of one position."""
    critic: int
    """The values of one position, all layers."""
    encode: int
    """A snapshot into the world model's latent."""
    imagine: int
    """One imagined token: memory reads, latent step, decoding of every layer."""
    write_token: int
    """The plan writer, per token of the line."""
    write: int
    """The plan writer's read-out, once a plan."""
    inject: int
    """Applying a plan to the states of all layers."""

    @property
    def token(self) -> int:
        """Saying one token: the one before it is consumed, logits are computed."""
        return self.backbone + self.policy

    @property
    def simulation(self) -> int:
        """One simulation of the search at most (one that ends in a known terminal leaf asks no network)."""
        return self.imagine + self.policy + self.critic

    def plan(self, simulations: int, lag: int, line: int) -> int:
        """One plan: projection over the known token and ``lag`` assumed ones, search, writer, and its application."""
        project = self.encode + (1 + lag) * self.imagine + lag * self.policy
        search = self.policy + self.critic + simulations * self.simulation
        return project + search + line * self.write_token + self.write + self.inject


def costs(model: CRSM) -> Costs:
    """The costs of a model with the world model that its settings name."""
    sizes, settings = model.config.model.backbone, model.config.model
    state = sizes.n_heads * sizes.headdim * sizes.d_state
    backbone = sum(_layer(layer, state) for layer in model.backbone.modules() if isinstance(layer, Layer))
    mixed = sizes.n_layer * sizes.d_model
    world, writer = model.world_model, model.writer
    if settings.world_model.kind == "latent":
        memory = len(world.read_layers) * state
        encode = _matrix(world.encoder)
        imagine = memory + sum(
            _matrix(part)
            for part in (world.query, world.read, world.decoder_linear, world.decoder_in, world.decoder_out)
        )
        imagine += _matrices(world.cell)
    else:
        encode, imagine = 0, backbone
    return Costs(
        backbone=backbone,
        policy=mixed + model.lm_head.weight.numel(),
        critic=model.critic.weight_LD.numel() + sizes.n_layer,
        encode=encode,
        imagine=imagine,
        write_token=_matrices(writer.gru),
        write=_matrix(writer.u) + _matrix(writer.b),
        # Outer products, and the blend of state and target.
        inject=sizes.n_layer * (settings.writer.rank + 1) * state,
    )


def _layer(layer: Layer, state: int) -> int:
    mixer = layer.mixer
    return _matrix(mixer.in_proj) + mixer.conv1d.weight.numel() + 3 * state + _matrix(mixer.out_proj)


def _matrices(cell: nn.Module) -> int:
    """Of a GRU: input and recurrent matrix of its three gates."""
    return sum(parameter.numel() for name, parameter in cell.named_parameters() if name.startswith("weight"))


def _matrix(linear: nn.Linear) -> int:
    return linear.weight.numel()
