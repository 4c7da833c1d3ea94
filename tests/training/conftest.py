"""A model that trains in seconds."""

import pytest
import torch

from crsm.config import load_config
from crsm.data.tokenizer import build_tokenizer
from crsm.evaluation.rollouts import Rollout
from crsm.model import build_model
from crsm.tasks import build_tasks
from crsm.training.assembly import AssemblyStage
from crsm.training.backbone import BackboneStage
from crsm.training.dynamics import DynamicsStage
from crsm.training.judgment import JudgmentStage

TINY = [
    "model.backbone.d_model=32",
    "model.backbone.n_layer=2",
    "model.backbone.d_state=8",
    "model.backbone.headdim=16",
    "model.backbone.chunk_size=16",
    "model.world_model.width=16",
    "model.world_model.decoder_width=32",
    "model.writer.width=16",
    "tasks=[{name: path_star, arms: 2, length: 3, labels: 12}]",
    *(
        f"stage_{stage}.{key}={value}"
        for stage in (1, 2, 3, 4)
        for key, value in {"batch": 8, "evaluate_problems": 8, "log_every": 1}.items()
    ),
    "stage_2.unroll=4",
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_stage():
    """``make_stage("stage_1", "stage_1.steps=5", …)``: a fresh stage on a freshly made tiny model."""

    def make(name, *overrides):
        config = load_config(None, [*TINY, *overrides])
        tasks = build_tasks(config.tasks)
        tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer)
        common = (model, getattr(config, name), config.seed, tasks, tokenizer)
        match name:
            case "stage_1":
                return BackboneStage(*common)
            case "stage_2":
                return DynamicsStage(*common)
            case "stage_3":
                return JudgmentStage(*common, invented_rollouts(tasks, tokenizer))
            case _:
                return AssemblyStage(*common, config.deliberation.plan_length)

    return make


def invented_rollouts(tasks, tokenizer):
    """Solutions and their reversals."""
    rollouts = []
    for index in range(16):
        problem = tasks[0].generate(0, "train", index)
        words = problem.solution.split()
        for correct, answer in ((True, words), (False, words[::-1])):
            tokens = tokenizer.encode(" ".join(answer))
            rollouts.append(Rollout(problem.task, 1, tuple(tokenizer.encode(problem.prompt)), tuple(tokens), correct))
    return rollouts
