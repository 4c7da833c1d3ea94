"""Settings of the four stages, of their optimizer, and of where they run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crsm.settings import Positive, Probability, Settings

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class OptimizerConfig(Settings):
    lr: Annotated[float, Field(gt=0)] = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Global gradient norm."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warmup."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    final_lr: Probability = 0.05
    """Last learning rate as a share of ``lr``."""
    wsd_decay: Probability = 0.2
    """Share of the steps that a WSD schedule spends decaying."""
    accumulate: Positive = 1
    """Micro-batches per optimizer step."""
    ema: Probability | None = None
    """Decay of an exponential moving average of the weights; None: off."""


class StageConfig(Settings):
    """What all four stages share."""

    steps: Positive
    batch: Positive
    """Sequences (stage 1, 4) or problems (stage 2) per optimizer step over all workers."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: Positive = 250
    evaluate_every: Positive = 250
    evaluate_problems: Positive = 128
    """At least one of every task, however few."""
    log_every: Positive = 25


class TextConfig(Settings):
    """Open text that stage 1 reads beside its tasks."""

    shards: str
    """A folder that ``jobs.prepare_data`` has made; its tokenizer must be the model's."""
    share: Probability = 0.5
    """Of the rows of a batch."""
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row. A document goes on over the end of a row only without what stood before it."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Of the sources, by name; none: as many rows as they have tokens. A source that is not named has none."""
    verify: bool = True
    """Whether every shard's hash is compared with the index before training."""


class CurriculumPoint(Settings):
    """What the batches hold at one point of a stage; between two points, shares change evenly."""

    at: Probability
    """Share of the stage's steps."""
    share: Probability | None = None
    """Of text among the rows; None: ``text.share``."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Of tasks and of sources of text, by name; who is not named keeps the weight of its own settings."""


class BackboneStageConfig(StageConfig):
    steps: Positive = 5000
    batch: Positive = 64
    freeze_backbone: bool = False
    """Train the critics alone, on the states of a backbone that stays what it is: what System 1 says is not changed.
    For imported weights; they judge what these states tell apart, and no more."""
    value_weight: Annotated[float, Field(ge=0)] = 0.5
    fusion_entropy: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the bonus on the entropy of the fusion weights."""
    solution_share: Probability = 0.5
    """Share of the sequences that hold the solution; the others hold an attempt."""
    bootstrap_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of a first training on solutions alone, for open text without recorded attempts: the model that it gives
    makes them. 0: none."""
    bootstrap_problems: Positive = 1024
    """Training problems at which the bootstrapped model, or the frozen one, makes an attempt each."""
    text: TextConfig | None = None
    curriculum: tuple[CurriculumPoint, ...] = ()
    """In ascending order; before the first point its shares hold, after the last one the last's. Empty: the weights are
    the same in all steps."""

    @model_validator(mode="after")
    def _curriculum_is_possible(self) -> BackboneStageConfig:
        at = [point.at for point in self.curriculum]
        if at != sorted(set(at)):
            raise ValueError(f"curriculum.at = {at}; allowed: ascending, each once")
        if self.text is None and any(point.share is not None for point in self.curriculum):
            raise ValueError("curriculum.share without text; allowed: stage_1.text with its shards")
        return self

    @model_validator(mode="after")
    def _frozen_backbone_learns_no_text(self) -> BackboneStageConfig:
        if self.freeze_backbone and self.bootstrap_steps:
            raise ValueError(f"bootstrap_steps = {self.bootstrap_steps} with freeze_backbone; allowed: 0")
        if self.freeze_backbone and self.text is not None:
            raise ValueError("text with freeze_backbone; allowed: null, as text has no verdicts to learn from")
        return self


class DynamicsStageConfig(StageConfig):
    steps: Positive = 700
    batch: Positive = 24
    attempts: Positive = 4
    """Attempts per problem; the prompt is run once for all of them."""
    unroll: Positive = 8
    """K: steps of the world model from every root."""
    roots: Positive | None = None
    """Roots per sequence, drawn at random; None: every position of the answer."""
    policy_weight: Annotated[float, Field(ge=0)] = 1.0
    value_weight: Annotated[float, Field(ge=0)] = 2.0
    cosine_weight: Annotated[float, Field(ge=0)] = 0.1
    trust_kl: Annotated[float, Field(gt=0)] = 0.25
    """The trust horizon is the last step up to which mean policy KL (nats) and value error stay under these, in every
    task that goes on so long."""
    trust_value_error: Annotated[float, Field(gt=0)] = 0.15


class JudgmentStageConfig(StageConfig):
    steps: Positive = 200
    batch: Positive = 64
    iterations: Positive = 1
    """Rounds of roll-outs and training."""
    problems: Positive = 512
    """Problems per round, each rolled out by System 1 and by System 2."""
    actors: Positive = 2
    temperature: Annotated[float, Field(ge=0)] = 1.0
    gate_accuracy: Probability = 0.90
    """Pairwise branch accuracy below which stage 4 keeps its gates shut."""


class AssemblyStageConfig(StageConfig):
    steps: Positive = 1000
    batch: Positive = 64
    rates: tuple[Probability, ...] = (0.1, 0.2)
    """α drawn in training."""
    earlier_write: Probability = 0.5
    """Share of states that already carry an earlier plan's write."""
    after_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the KL to the uninjected backbone on the tokens after the plan."""
    calibration_problems: Positive = 512
    """Held-out problems that calibrate the gates."""


class TrainConfig(Settings):
    """Where and on what the stages run."""

    workers: Positive = 1
    min_workers: Positive | None = None
    """Workers that are enough to go on with where nodes come and go; None: always ``workers``."""
    resize_seconds: Annotated[float, Field(ge=0)] = 60.0
    """How often it is looked whether there is room for more, up to ``workers``."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of torch per worker; 0: the machine's cores over the workers."""
    use_gpu: bool = False
    storage_path: str = "runs"
    """Where runs lie: a folder that every node sees, or ``s3://…`` or ``gs://…``."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """Restarts of a failed worker group before the job gives up; what a preempted node breaks is not counted."""
    keep_checkpoints: Positive = 2
    """States of a run that are kept, the newest ones; older ones are removed."""
    async_checkpoints: bool = False
    """Whether training goes on while a state is written."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: matrices are multiplied in bfloat16. Master weights, optimizer, ``A_log``, ``dt_bias`` and the
    recurrent state are fp32 whatever it is."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: every worker holds the whole model. ``fsdp``: weights, gradients and optimizer are sharded over the
    workers, for what one device does not hold; with one worker there is one shard."""
    checkpoint_activations: bool = False
    """Whether a layer's activations are computed again in the backward pass instead of being kept."""
    compile: bool = False
    """Whether the backbone goes through ``torch.compile``."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the curves go; ``wandb`` and ``mlflow`` need the extras of these names."""

    @model_validator(mode="after")
    def _at_most_all_workers(self) -> TrainConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}; allowed: at most workers = {self.workers}")
        return self
