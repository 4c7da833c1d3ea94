"""CRSM: the parts of both systems together; saving, loading.

A checkpoint is a folder of ``config.json``, ``model.safetensors`` and ``tokenizer.json``. It is written beside its
place and moved there whole; ``config.json`` holds size and hash of the other files, so that a truncated or mixed-up
checkpoint is refused with both values named. A folder that ``crsm export`` wrote is a checkpoint too: the same
description is called ``crsm.json`` there, and the weights lie in several files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crsm import __version__
from crsm.config import Config, parse_config
from crsm.critic import Critic
from crsm.data.tokenizer import Tokenizer
from crsm.description import FILES, FORMAT, check_files, description_file, fingerprint
from crsm.fusion import Fusion
from crsm.gate import Gate
from crsm.kernels import Kernels
from crsm.latent_dynamics import ExactDynamics, LatentDynamics, WorldModel
from crsm.mamba_ssm import Backbone
from crsm.overrides import SHAPELESS
from crsm.plan_writer import PlanWriter
from crsm.types import ModelState

ASSETS = Path(__file__).parent / "assets"
PARTS = ("backbone", "lm_head", "fusion", "critic", "world_model", "writer", "gate")


class CRSM(nn.Module):
    """System 1 (``backbone``, ``fusion``) and System 2's parts (``critic``, ``world_model``, ``writer``, ``gate``).

    Parameter names of the backbone are those of ``mamba-ssm`` (``backbone.layers.0.mixer.A_log``, ``lm_head.weight``).
    """

    def __init__(self, config: Config, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        sizes = config.model.backbone
        self.backbone = Backbone(sizes, kernels)
        self.lm_head = nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
        if sizes.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.fusion = Fusion(sizes.n_layer)
        self.critic = Critic(sizes.n_layer, sizes.d_model, config.model.critic)
        self.world_model = LatentDynamics(config.model, self.backbone.embedding, kernels)
        self.writer = PlanWriter(config.model, self.backbone.embedding)
        self.gate = Gate(sizes.n_layer)

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """The fused policy head: residual streams (…, L, D) to next-token logits (…, V)."""
        kernels = self.backbone.kernels
        logits_V = kernels.linear(self.backbone.norm_f(self.fusion(hidden_LD), kernels), self.lm_head.weight)
        return logits_V.to(hidden_LD.dtype)  # under autocast the product is bfloat16, what is made of it is not

    def planning_model(self) -> WorldModel:
        """The world model that the settings name."""
        return self.world_model if self.config.model.world_model.kind == "latent" else ExactDynamics(self.backbone)

    def prefill(self, tokens_BT: Tensor, state: ModelState | None = None) -> tuple[Tensor, Tensor, ModelState]:
        """Consumes prompts of equal length: last logits (B, V), last residual streams (B, L, D), and the state."""
        hidden_BTLD, state = self.backbone(tokens_BT, state)
        hidden_BLD = hidden_BTLD[:, -1]
        return self.logits(hidden_BLD), hidden_BLD, state

    def num_parameters(self) -> dict[str, int]:
        """Parameters of every part; a tied matrix counts once, with the backbone."""
        seen: set[int] = set()
        counts = {}
        for name in PARTS:
            parameters = [p for p in getattr(self, name).parameters() if id(p) not in seen]
            seen.update(id(p) for p in parameters)
            counts[name] = sum(p.numel() for p in parameters)
        assert sum(counts.values()) == sum(p.numel() for p in self.parameters()), "a part is missing from PARTS"
        return counts


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with what it needs to run and what is known about it."""

    model: CRSM
    tokenizer: Tokenizer
    trust_horizon: int | None = None
    """Steps over which the learned world model's measured fidelity holds; caps its search. None: never measured."""
    model_version: int = 0
    """Changes with every change of the weights; a plan made with another version is refused."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the training stages measured."""
    weights_hash: str = ""
    """Start of the sha256 of the weights file; empty for weights that were never saved."""

    @property
    def config(self) -> Config:
        return self.model.config


def build_model(config: Config, tokenizer: Tokenizer, kernels: Kernels | None = None) -> CRSM:
    """A freshly initialised model (from torch's global generator) whose vocabulary is the tokenizer's.

    The embedding of an imported model may have more rows than its tokenizer has tokens.

    Raises:
        ValueError: the settings name another vocabulary size than the tokenizer has.
    """
    sizes = config.model.backbone
    padded = tokenizer.is_foreign and sizes.vocab_size > tokenizer.vocab_size
    if sizes.vocab_size not in (0, tokenizer.vocab_size) and not padded:
        raise ValueError(
            f"model.backbone.vocab_size = {sizes.vocab_size}; allowed: 0, or the tokenizer's {tokenizer.vocab_size}"
        )
    backbone = sizes.model_copy(update={"vocab_size": max(sizes.vocab_size, tokenizer.vocab_size)})
    model = config.model.model_copy(update={"backbone": backbone})
    return CRSM(config.model_copy(update={"model": model}), kernels)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a checkpoint folder; an existing one is replaced only once the new one is whole.

    Args:
        checkpoint: what is written.
        path: the folder.
        dtype: of the matrices in the file (see :func:`cast_matrices`); None: as they are. Whoever loads the checkpoint
            computes in fp32 all the same.

    Raises:
        OSError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        state = {
            name: tensor.contiguous() for name, tensor in cast_matrices(checkpoint.model.state_dict(), dtype).items()
        }
        if checkpoint.config.model.backbone.tie_embeddings:
            del state["lm_head.weight"]
        try:
            save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # the library wraps the operating system's error
            raise OSError(f"{staging / 'model.safetensors'}: {error}") from error
        checkpoint.tokenizer.save(staging / "tokenizer.json")
        description = {
            "format": FORMAT,
            "crsm_version": __version__,
            "model_version": checkpoint.model_version,
            "trust_horizon": checkpoint.trust_horizon,
            "files": {name: fingerprint(staging / name) for name in FILES},
            "config": checkpoint.config.model_dump(mode="json"),
            "report": checkpoint.report,
        }
        with open(staging / "config.json", "w", encoding="utf-8") as file:
            json.dump(description, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        # Both libraries make their files for the owner alone; a checkpoint is for whoever may read the folder.
        os.chmod(staging, 0o755)
        for name in FILES:
            os.chmod(staging / name, 0o644)
        _move_into_place(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def cast_matrices(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Matrices in ``dtype``; what has one axis (norms, ``A_log``, ``dt_bias``, ``D``, biases, gates) as it is."""
    return {
        name: tensor.to(dtype) if dtype is not None and tensor.ndim >= 2 and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _move_into_place(staging: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
        os.rename(path, old)
        try:
            os.rename(staging, path)
        except OSError:
            os.rename(old, path)
            raise
        finally:
            shutil.rmtree(old.parent)
    else:
        os.rename(staging, path)


def use_settings(checkpoint: Checkpoint, config: Config) -> None:
    """Puts settings that fit the weights in the place of a checkpoint's own."""
    checkpoint.model.config = config
    checkpoint.model.critic.uncertainty_penalty = config.model.critic.uncertainty_penalty


def resolve_checkpoint(name: str | Path) -> Path:
    """A checkpoint folder from its path, or from the name of a shipped one (``nano``).

    Raises:
        ValueError: there is no such folder; the shipped names are listed.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    shipped = sorted(folder.parent.name for folder in ASSETS.glob("*/config.json"))
    if str(name) in shipped:
        return ASSETS / str(name)
    raise ValueError(
        f"checkpoint = {str(name)!r}: no folder with a config.json; allowed: such a folder, or one of "
        f"{', '.join(shipped) or '(none shipped)'}"
    )


def load_checkpoint(
    name: str | Path, kernels: Kernels | None = None, config: Config | None = None, renewable: Collection[str] = ()
) -> Checkpoint:
    """Loads a checkpoint, in evaluation mode, on the CPU.

    Args:
        name: folder, or the name of a shipped checkpoint.
        kernels: None: the best of the machine.
        config: settings the caller expects; their ``model`` must be the checkpoint's, but for what fixes no shape
            (which world model imagines, and how far the critics are trusted).
        renewable: parts (``world_model``, ``writer``) that may be of other settings in ``config``: such a part is made
            anew, from torch's global generator, for whoever is about to train it. What was measured of the old one
            holds no more: the gates are shut, and the trust horizon of another world model is unknown.

    Raises:
        ValueError: missing, truncated or altered files, another format, other sizes, tensors that are missing, left
            over or of another shape; both values are named.
    """
    path = resolve_checkpoint(name)
    description = check_files(path)
    saved = parse_config(description["config"], source=str(description_file(path)))
    renewed: tuple[str, ...] = ()
    if config is not None:
        saved, renewed = _renew(_with_shapeless(saved, config), config, renewable)
        _check_same_model(saved, config, path)
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    model = build_model(saved, tokenizer, kernels)
    load_weights(model, [path / name for name in description["files"] if name.endswith(".safetensors")], renewed)
    return Checkpoint(
        model.eval(),
        tokenizer,
        trust_horizon=None if "world_model" in renewed else description["trust_horizon"],
        model_version=int(description["model_version"]),
        report=description["report"],
        weights_hash=description.get("weights_hash") or description["files"]["model.safetensors"]["sha256"][:16],
    )


def _with_shapeless(saved: Config, config: Config) -> Config:
    """The checkpoint's settings with those of the other that its weights serve whatever they are."""
    tree, asked = saved.model_dump(mode="json"), config.model_dump(mode="json")
    for *sections, key in SHAPELESS:
        into, of = tree, asked
        for section in sections:
            into, of = into[section], of[section]
        into[key] = of[key]
    return parse_config(tree, source="config")


def _renew(saved: Config, config: Config, renewable: Collection[str]) -> tuple[Config, tuple[str, ...]]:
    """The checkpoint's settings with those of the parts that are to be made anew, and the names of what will be new:
    these and the gate, which was calibrated with them."""
    parts = {name: getattr(config.model, name) for name in renewable}
    renewed = {name: part for name, part in parts.items() if part != getattr(saved.model, name)}
    names = (*renewed, "gate") if renewed else ()
    return saved.model_copy(update={"model": saved.model.model_copy(update=renewed)}), names


def load_weights(model: CRSM, files: Path | Sequence[Path], renewed: Collection[str] = ()) -> None:
    """Fills every tensor of ``model`` from safetensors files, but for those of the parts in ``renewed``.

    Raises:
        ValueError: naming the first tensor that is missing, left over, or of another shape.
    """
    files = [files] if isinstance(files, Path) else list(files)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error
    path = files[0] if len(files) == 1 else files[0].parent
    own = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] not in renewed}
    tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in renewed}
    if model.config.model.backbone.tie_embeddings:
        del own["lm_head.weight"]
    for name, tensor in own.items():
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name!r} is missing; the model needs it with shape {tuple(tensor.shape)}")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}; the model has {tuple(tensor.shape)}"
            )
    left_over = sorted(set(tensors) - set(own))
    if left_over:
        raise ValueError(f"{path}: tensor {left_over[0]!r} is not one of the model's")
    model.load_state_dict(tensors, strict=False)


def _check_same_model(saved: Config, config: Config, path: Path) -> None:
    asked, found = config.model.model_dump(), saved.model.model_dump()
    if asked["backbone"]["vocab_size"] == 0:
        found["backbone"]["vocab_size"] = 0
    for section in asked:
        for key in asked[section]:
            if asked[section][key] != found[section][key]:
                raise ValueError(
                    f"{path}: model.{section}.{key} = {found[section][key]!r}; the config asks {asked[section][key]!r}"
                )
