"""What stages are evaluated on."""

from crsm.config import BackboneStageConfig, OptimizerConfig, TokenizerConfig
from crsm.data.tokenizer import build_tokenizer
from crsm.tasks import build_tasks
from crsm.tasks.path_star import PathStarConfig
from crsm.tasks.tree_path import TreePathConfig
from crsm.training.rows import BackboneRows


def test_every_task_is_evaluated_however_few_problems_are_asked_for() -> None:
    tasks = build_tasks([PathStarConfig(arms=2, length=3, labels=12), TreePathConfig(depth=2, labels=12)])
    settings = BackboneStageConfig(steps=1, batch=2, evaluate_problems=1, optimizer=OptimizerConfig(warmup=0))
    rows = BackboneRows(settings, 0, tasks, build_tokenizer(TokenizerConfig(), tasks, 0))
    assert {rows.name(part) for part in rows.held_out()} == {"path_star", "tree_path"}
