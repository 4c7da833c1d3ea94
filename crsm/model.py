"""CRSM: the parts of both systems together; saving, loading.

A checkpoint is a folder of ``config.json``, ``model.safetensors`` and ``tokenizer.json``. It is written beside its
place and moved there whole; ``config.json`` holds size and hash of the other files, so that a truncated or mixed-up
checkpoint is refused with both values named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crsm import __version__
from crsm.config import Config, parse_config
from crsm.critic import Critic
from crsm.data.tokenizer import Tokenizer
from crsm.fusion import Fusion
from crsm.gate import Gate
from crsm.kernels import Kernels
from crsm.latent_dynamics import ExactDynamics, LatentDynamics, WorldModel
from crsm.mamba_ssm import Backbone
from crsm.plan_writer import PlanWriter
from crsm.types import ModelState

FORMAT = 1
ASSETS = Path(__file__).parent / "assets"
FILES = ("model.safetensors", "tokenizer.json")
"""Files of a checkpoint whose size and hash ``config.json`` holds."""
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
    """Steps over which the world model's measured fidelity holds; caps the search. None: never measured."""
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


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Writes a checkpoint folder; an existing one is replaced only once the new one is whole.

    Raises:
        OSError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        state = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
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
            "files": {name: _fingerprint(staging / name) for name in FILES},
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


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
        config: settings the caller expects; their ``model`` must be the checkpoint's.
        renewable: parts (``world_model``, ``writer``) that may be of other settings in ``config``: such a part is made
            anew, from torch's global generator, for whoever is about to train it.

    Raises:
        ValueError: missing, truncated or altered files, another format, other sizes, tensors that are missing, left
            over or of another shape; both values are named.
    """
    path = resolve_checkpoint(name)
    description = _read_description(path)
    for file in FILES:
        _check_file(path / file, description["files"][file])
    saved = parse_config(description["config"], source=f"{path / 'config.json'}")
    renewed: tuple[str, ...] = ()
    if config is not None:
        saved, renewed = _renew(saved, config, renewable)
        _check_same_model(saved, config, path)
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    model = build_model(saved, tokenizer, kernels)
    load_weights(model, path / "model.safetensors", renewed)
    return Checkpoint(
        model.eval(),
        tokenizer,
        trust_horizon=description["trust_horizon"],
        model_version=int(description["model_version"]),
        report=description["report"],
        weights_hash=description["files"]["model.safetensors"]["sha256"][:16],
    )


def _renew(saved: Config, config: Config, renewable: Collection[str]) -> tuple[Config, tuple[str, ...]]:
    """The checkpoint's settings with those of the parts that are to be made anew, and the names of these."""
    parts = {name: getattr(config.model, name) for name in renewable}
    renewed = {name: part for name, part in parts.items() if part != getattr(saved.model, name)}
    return saved.model_copy(update={"model": saved.model.model_copy(update=renewed)}), tuple(renewed)


def load_weights(model: CRSM, path: Path, renewed: Collection[str] = ()) -> None:
    """Fills every tensor of ``model`` from a safetensors file, but for those of the parts in ``renewed``.

    Raises:
        ValueError: naming the first tensor that is missing, left over, or of another shape.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
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


def _read_description(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a whole JSON file: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{file}: format = {found!r}; allowed: {FORMAT}")
    missing = {"files", "config", "trust_horizon", "model_version", "report"} - set(description)
    if missing:
        raise ValueError(f"{file}: key {sorted(missing)[0]!r} is missing")
    for name in FILES:
        if not {"bytes", "sha256"} <= set(description["files"].get(name, {})):
            raise ValueError(f"{file}: files.{name} is missing; allowed: its bytes and sha256")
    return description


def _check_file(path: Path, want: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing; the checkpoint names it with {want['bytes']} bytes")
    found = _fingerprint(path)
    if found["bytes"] != want["bytes"]:
        raise ValueError(f"{path}: {found['bytes']} bytes; the checkpoint names {want['bytes']}")
    if found["sha256"] != want["sha256"]:
        raise ValueError(f"{path}: sha256 {found['sha256'][:16]}…; the checkpoint names {want['sha256'][:16]}…")


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
