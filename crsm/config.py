"""Typed, strict settings. YAML is their serialisation; an unknown key or a value out of range is an error.

This module imports neither torch nor Ray, so that commands can parse, complain and print help in a moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from crsm.settings import AnySettings, Positive, Probability, Settings
from crsm.task_config import ArcAgiConfig as ArcAgiConfig
from crsm.task_config import ArcConfig as ArcConfig
from crsm.task_config import ArithmeticConfig as ArithmeticConfig
from crsm.task_config import CountdownConfig as CountdownConfig
from crsm.task_config import Gsm8kConfig as Gsm8kConfig
from crsm.task_config import GymConfig as GymConfig
from crsm.task_config import MazeConfig as MazeConfig
from crsm.task_config import PathStarConfig as PathStarConfig
from crsm.task_config import ProsqaConfig as ProsqaConfig
from crsm.task_config import SudokuConfig as SudokuConfig
from crsm.task_config import TaskConfig as TaskConfig
from crsm.task_config import TokenizerConfig as TokenizerConfig
from crsm.task_config import TreePathConfig as TreePathConfig
from crsm.training_config import AssemblyStageConfig as AssemblyStageConfig
from crsm.training_config import BackboneStageConfig as BackboneStageConfig
from crsm.training_config import DynamicsStageConfig as DynamicsStageConfig
from crsm.training_config import JudgmentStageConfig as JudgmentStageConfig
from crsm.training_config import OptimizerConfig as OptimizerConfig
from crsm.training_config import StageConfig as StageConfig
from crsm.training_config import TrainConfig as TrainConfig
from crsm.types import Channel


class BackboneConfig(Settings):
    """Sizes of the Mamba-2 backbone; the names are those of ``mamba-ssm``."""

    vocab_size: Annotated[int, Field(ge=0)] = 0
    """Rows of the embedding; 0: taken from the tokenizer when the model is built."""
    d_model: Positive = 96
    n_layer: Positive = 4
    d_state: Positive = 32
    """N"""
    headdim: Positive = 32
    """P"""
    expand: Positive = 2
    """Inner width over d_model; H = expand · d_model / headdim."""
    d_conv: Annotated[int, Field(ge=2)] = 4
    """K"""
    chunk_size: Positive = 64
    """Tokens per chunk of the parallel forward; does not change its result beyond rounding."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_channels(self) -> int:
        return self.d_inner + 2 * self.d_state

    @model_validator(mode="after")
    def _heads_divide(self) -> BackboneConfig:
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim = {self.headdim} does not divide expand · d_model = {self.d_inner}; allowed: a divisor of it"
            )
        return self


class CriticConfig(Settings):
    uncertainty_penalty: Annotated[float, Field(ge=0.0)] = 0.25
    """λ of the consensus ``V = Σ k_i v_i − λ · std_i(v_i)``."""


class WorldModelConfig(Settings):
    kind: Literal["latent", "exact"] = "latent"
    """What planners imagine with. ``latent``: the GRU that stage 2 fits; ``exact``: the backbone's own step, which
    never errs and costs a token of System 1 each time: for small backbones."""
    width: Positive = 128
    """G"""
    read_layers: tuple[int, ...] | None = None
    """Layers whose SSM memory the planner reads (and the snapshot carries); None: all."""
    decoder_width: Positive = 256


class WriterConfig(Settings):
    width: Positive = 128
    rank: Positive = 1


class ModelConfig(Settings):
    """Everything that fixes the shapes of a checkpoint."""

    backbone: BackboneConfig = BackboneConfig()
    critic: CriticConfig = CriticConfig()
    world_model: WorldModelConfig = WorldModelConfig()
    writer: WriterConfig = WriterConfig()

    @model_validator(mode="after")
    def _layers_exist(self) -> ModelConfig:
        layers = self.world_model.read_layers
        if layers is not None and (not layers or any(not 0 <= i < self.backbone.n_layer for i in layers)):
            raise ValueError(
                f"world_model.read_layers = {layers}; allowed: layers between 0 and {self.backbone.n_layer - 1}, "
                "at least one"
            )
        return self


class SearchConfig(Settings):
    """Settings of the tree search; the defaults are those that the shipped checkpoint's report favours."""

    policy: Literal["puct", "gumbel"] = "puct"
    simulations: Positive = 64
    num_actions: Positive = 6
    """A: children expanded per node, the most likely ones."""
    max_depth: Positive = 6
    """Depth cap; the world model's trust horizon caps it further."""
    puct_c_init: Annotated[float, Field(ge=0)] = 1.0
    puct_c_base: Annotated[float, Field(gt=0)] = 19652.0
    q_transform: Literal["raw", "minmax"] = "raw"
    """How PUCT scales values: as they are (probabilities in [0, 1]), or by the range of parent and siblings (mctx)."""
    root_prior_mass: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Root actions outside the smallest set that holds this prior mass are not considered."""
    gumbel_scale: Annotated[float, Field(ge=0)] = 0.0
    """Root noise of the Gumbel policy; 0 at inference."""
    max_considered_actions: Positive = 16
    """Root actions that enter sequential halving."""
    gumbel_value_scale: Annotated[float, Field(gt=0)] = 0.1
    gumbel_maxvisit_init: Annotated[float, Field(ge=0)] = 50.0
    leaves: Annotated[int, Field(ge=1, le=65536)] = 1
    """Leaves of one tree that are evaluated together; 1: the reference search. More need the native core."""
    virtual_loss: Annotated[int, Field(ge=0, le=1024)] = 0
    """Visits of value 0 that a leaf in flight puts on its way, so that the next one goes elsewhere; at least 1 with
    several leaves, without effect with one."""


class DeliberationConfig(Settings):
    """How System 2 is asked and how its plans are applied."""

    lag: Annotated[int, Field(ge=0)] = 2
    """Tokens between the request and the plan's target; 0 is the synchronous upper bound of ablations."""
    max_lag: Annotated[int, Field(ge=0)] = 8
    """A plan later than this many tokens after its target is dropped."""
    late_decay: Probability = 0.9
    """A late plan's α is multiplied by this once per token of lateness."""
    injection_rate: Probability = 0.2
    channel: Channel = Channel.STATE
    plan_length: Positive = 4
    """Tokens of the principal variation that are written."""
    plan_every: Positive = 1
    """Ask at every n-th generated position."""
    max_plans: Annotated[int, Field(ge=0)] | None = None
    """Requests per generation; 0: System 1 alone; None: no bound."""
    hypotheses: Positive = 1
    withdraw: bool = True
    """Take a superseded or spent write out of the state again."""
    park_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of the next turn that are foreseen while a generation is parked; 0: no thinking between turns."""
    park_simulations: Positive = 4096
    """Simulations that one pause between turns may cost."""


class SamplingConfig(Settings):
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """0: greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: off."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Positive = 64
    seed: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    """Go on to ``max_tokens`` whatever is said (measurements)."""


DeviceName = Literal["auto", "cpu", "cuda"]
"""``auto``: a GPU if there is one (for an actor: if Ray reserves one for it), else the CPU."""


class EngineConfig(Settings):
    device: DeviceName = "cpu"
    """Where System 1 consumes tokens and keeps its states."""
    cuda_graphs: bool = True
    """On a GPU a step is recorded once per size of the batch and replayed, instead of launched kernel by kernel."""
    clock: Literal["virtual", "wall"] = "virtual"
    """``virtual``: a plan is there exactly at its target, whatever the machine's speed; ``wall``: when it arrives."""
    pace: Annotated[float, Field(gt=0)] | None = None
    """Tokens per second of a generation that sets no pace of its own (wall clock only); None: as fast as the machine
    goes."""
    max_batch: Positive = 256
    """Generations decoded together; their memory is known in advance (``crsm inspect``)."""
    max_waiting: Positive = 1024
    """Generations that wait for a place in the batch; one more is refused."""
    max_parked: Annotated[int, Field(ge=0)] = 256
    """Generations kept between their turns; the one that rested longest is forgotten for one more."""
    park_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long a parked generation and a saved state are kept."""
    max_state_bytes: Positive = 2**30
    """Saved states kept by one generator; those that end first go when there are more."""
    prefill_chunk: Positive = 512
    """Tokens of prompts consumed per step while others are decoded: a long prompt goes in by parts of this length."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """Numbers of the messages between generator and planners."""
    stream_interval: Annotated[float, Field(ge=0)] = 0.005
    """Seconds between two messages of a stream at least; what was said meanwhile comes together."""
    decoder: Literal["auto", "native", "torch"] = "auto"
    """Who consumes a token: ``native``, the C++ core; ``torch``, the backbone's own ``step``; ``auto``: the native one
    where it is installed and the model is fp32 on the CPU."""
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    """How the native decoder keeps the matrices; arithmetic and state are fp32 whatever it is."""

    @model_validator(mode="after")
    def _rounding_is_native(self) -> EngineConfig:
        if self.decoder == "torch" and self.weights != "fp32":
            raise ValueError(f"weights = {self.weights!r} with decoder = 'torch'; allowed: 'fp32', or another decoder")
        return self


class PlannersConfig(Settings):
    count: Annotated[int, Field(ge=0)] = 1
    """Planner threads or actors; 0: System 1 alone."""
    max_count: Positive | None = None
    """Actors at most: between ``count`` and this, as many as answer in time under the wall clock; None: ``count``."""
    device: DeviceName = "cpu"
    """Where the network of a search computes; the trees stay on the CPU."""
    threads: Positive = 1
    """Threads of torch inside one planner."""
    max_batch: Positive = 128
    """Requests of one search batch."""
    max_in_flight: Positive = 2
    """Batches queued at one planner."""
    max_waiting: Positive | None = None
    """Requests that wait for a planner under the wall clock, beyond which the least valuable are shed; None: one batch
    for every planner that works."""
    min_simulations: Positive = 16
    """A search is not cut below this to meet its deadline."""
    probe_interval: Annotated[float, Field(gt=0)] = 0.5
    """Seconds without a search after which a request is tried that looks too late: the estimate may be wrong."""
    target_rate: Probability = 0.9
    """With ``max_count``: share of the requests to be answered by their deadline, below which planners are added."""
    health_interval: Annotated[float, Field(gt=0)] = 1.0
    """Seconds of silence after which an actor is asked whether it lives."""
    health_timeout: Annotated[float, Field(gt=0)] = 15.0
    """Seconds without an answer to that, after which the actor is replaced."""
    search_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Wall clock: seconds after which a search is cancelled and, if that does not help, its actor replaced."""
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that Ray reserves for an actor; fractions share one."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for an actor: a share of one, which several actors then use, or a whole number."""

    @model_validator(mode="after")
    def _counts_are_ordered(self) -> PlannersConfig:
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"planners.num_gpus = {self.num_gpus:g}; allowed: a share of one, or a whole number")
        if self.max_count is not None and self.max_count < self.count:
            raise ValueError(f"planners.max_count = {self.max_count}; allowed: at least count = {self.count}")
        return self


class Config(Settings):
    """The whole tree of settings of one run."""

    name: str = "nano"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tasks: tuple[TaskConfig, ...] = (PathStarConfig(), TreePathConfig())
    search: SearchConfig = SearchConfig()
    deliberation: DeliberationConfig = DeliberationConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    planners: PlannersConfig = PlannersConfig()
    train: TrainConfig = TrainConfig()
    stage_1: BackboneStageConfig = BackboneStageConfig()
    stage_2: DynamicsStageConfig = DynamicsStageConfig()
    stage_3: JudgmentStageConfig = JudgmentStageConfig()
    stage_4: AssemblyStageConfig = AssemblyStageConfig()

    @model_validator(mode="after")
    def _tasks_differ(self) -> Config:
        names = [task.label for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks = {names}; allowed: at least one task, each name once (two of a kind: with an id)")
        if not self.planned_tasks:
            raise ValueError(f"plan = false for all of {', '.join(names)}; allowed: at least one task with plan = true")
        return self

    @property
    def planned_tasks(self) -> tuple[TaskConfig, ...]:
        """What stages 2 to 4 teach System 2."""
        return tuple(task for task in self.tasks if task.plan)


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Settings from a YAML file (None: the defaults) with ``section.key=value`` overrides, the later ones winning.

    A value is read as YAML: ``stage_1.steps=100``, ``search.policy=gumbel``, ``model.world_model.read_layers=[0,2]``.
    A task is named in the place of an index, by its ``id`` if it has one: ``tasks.path_star.arms=5``.

    Raises:
        ValueError: naming the file or override, the key, the value and what is allowed.
    """
    tree = {} if path is None else read_tree(path)
    config = parse_config(tree, source=str(path) if path is not None else "defaults")
    overrides = list(overrides)
    if not overrides:
        return config
    tree = config.model_dump(mode="json")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, source=f"--set {' '.join(overrides)}")


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ValueError: it cannot be read, is no YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config file {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict | None):
        raise ValueError(f"config file {str(path)!r} holds a {type(loaded).__name__}; allowed: a mapping")
    return loaded or {}


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Settings from plain data; ``ValueError`` in one line per fault, each naming ``source``, key and value."""
    return parse_settings(Config, tree, source)


def parse_settings(kind: type[AnySettings], tree: dict[str, Any], source: str) -> AnySettings:
    """The same for settings of any kind."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(fault, source, kind) for fault in error.errors())) from None


def _describe(fault: Any, source: str, kind: type[Settings]) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{source}: unknown key {path!r}; allowed: {', '.join(_siblings(fault['loc'], kind))}"
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(fault["input"], dict) else f" = {fault['input']!r}"
    return f"{source}: {path or 'config'}{shown}: {message}"


def _siblings(location: tuple[Any, ...], kind: type[Settings]) -> list[str]:
    """Names allowed beside an unknown key."""
    model: Any = kind
    for part in location[:-1]:
        if part in _TASKS:
            model = _TASKS[part]
        elif isinstance(part, int) and get_args(model):
            model = get_args(model)[0]
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else ["(none)"]


_TASKS: dict[Any, type[Settings]] = {
    name: kind for kind in get_args(get_args(TaskConfig)[0]) for name in get_args(kind.model_fields["name"].annotation)
}
"""The settings of every kind of task, by its name."""


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one ``section.key=value`` in plain data, in place.

    Raises:
        ValueError: the text has no ``=``, or the path does not lead to a key of the settings.
    """
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise ValueError(f"--set {override!r}; allowed: section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    *parents, key = path.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            by_name = {item.get("id") or item.get("name"): item for item in node if isinstance(item, dict)}
            if part not in by_name:
                raise ValueError(f"--set {override!r}: no task {part!r}; allowed: {', '.join(map(str, by_name))}")
            node = by_name[part]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            known = ", ".join(sorted(node)) if isinstance(node, dict) else "(none)"
            raise ValueError(f"--set {override!r}: unknown key {'.'.join(parents[: depth + 1])!r}; allowed: {known}")
    if not isinstance(node, dict):
        raise ValueError(f"--set {override!r}: {'.'.join(parents)!r} has no keys")
    node[key] = value


def dump_config(config: BaseModel) -> str:
    """The settings as YAML, complete, in declaration order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
