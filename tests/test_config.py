"""Settings are typed and strict: every shipped file loads, and every mistake is named together with what is allowed."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crsm.config import (
    Config,
    PathStarConfig,
    TreePathConfig,
    apply_override,
    dump_config,
    load_config,
    parse_config,
    read_tree,
)
from crsm.types import Channel

OTHER_KINDS = {"ablation", "tuning", "evaluation", "env_vars", "excludes", "working_dir"}
"""Keys of files that are no settings of a run: sweeps, evaluations, and the environment of submitted jobs."""
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if not OTHER_KINDS & set(read_tree(path))
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_names_itself(path):
    assert load_config(path).name == path.stem


def test_nano_trains_both_graph_tasks():
    config = load_config(next(path for path in CONFIGS if path.stem == "nano"))
    star, tree = config.tasks
    assert isinstance(star, PathStarConfig) and isinstance(tree, TreePathConfig)
    assert (star.arms, star.length, star.labels, star.preamble) == (3, 4, 30, 2)
    assert (tree.depth, tree.labels, tree.preamble) == (3, 30, 2)


@pytest.mark.parametrize("path", [None, *CONFIGS], ids=lambda path: path.stem if path else "defaults")
def test_settings_survive_a_round_trip_through_yaml(path, tmp_path):
    config = load_config(path)
    (tmp_path / "copy.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "copy.yaml") == config
    assert dump_config(load_config(tmp_path / "copy.yaml")) == dump_config(config)


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == load_config() == Config()


# ------------------------------------------------------------------------------------------------------- overrides


def test_the_last_override_wins():
    config = load_config(None, ["stage_1.steps=10", "search.policy=gumbel", "stage_1.steps=20"])
    assert (config.stage_1.steps, config.search.policy) == (20, "gumbel")


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("model.world_model.read_layers=[0,2]", lambda c: c.model.world_model.read_layers, (0, 2)),
        ("deliberation.channel=both", lambda c: c.deliberation.channel, Channel.BOTH),
        ("deliberation.max_plans=null", lambda c: c.deliberation.max_plans, None),
        ("stage_1.optimizer.lr=1.0e-3", lambda c: c.stage_1.optimizer.lr, 1e-3),
        ("stage_1.optimizer.lr=1e-3", lambda c: c.stage_1.optimizer.lr, 1e-3),
        ("train.use_gpu=true", lambda c: c.train.use_gpu, True),
        ("tasks.path_star.arms=5", lambda c: c.tasks[0].arms, 5),
        ("tasks.tree_path.depth=2", lambda c: c.tasks[1].depth, 2),
        ("tasks=[{name: tree_path}]", lambda c: c.tasks, (TreePathConfig(),)),
        ("name=a=b", lambda c: c.name, "a=b"),
    ],
)
def test_an_override_is_yaml_and_reaches_its_key(override, read, expected):
    config = load_config(None, [override])
    assert read(config) == expected
    assert read(Config()) != expected or expected is None


@given(st.integers(0, 8), st.floats(0, 1), st.integers(1, 10**6))
def test_overrides_say_what_the_file_would_say(lag, rate, steps):
    tree = {"deliberation": {"lag": lag, "injection_rate": rate}, "stage_2": {"steps": steps}}
    overrides = [f"deliberation.lag={lag}", f"deliberation.injection_rate={rate!r}", f"stage_2.steps={steps}"]
    assert load_config(None, overrides) == parse_config(tree, "test")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", r"'steps'; allowed: section.key=value"),
        ("=3", r"'=3'; allowed: section.key=value"),
        ("serch.policy=puct", r"unknown key 'serch'; allowed: .*search"),
        ("search.polcy=puct", r"unknown key 'search.polcy'; allowed: .*policy, .*simulations"),
        ("stage_1.optimizer.lrr=1", r"unknown key 'stage_1.optimizer.lrr'; allowed: .*lr"),
        ("tasks.path.arms=5", r"no task 'path'; allowed: path_star, tree_path"),
        ("tasks.path_star.legs=5", r"unknown key 'tasks.*legs'; allowed: arms, id, labels, length"),
        ("tasks.3=5", r"'tasks' has no keys"),
        ("seed.x=5", r"has no keys|unknown key 'seed.x'"),
        ("search.policy=[", r"the value is not YAML"),
        ("search.policy=best", r"search.policy = 'best': .*'puct' or 'gumbel'"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def test_an_override_changes_plain_data_in_place():
    tree = {"a": {"b": 1}}
    apply_override(tree, "a.b=2")
    assert tree == {"a": {"b": 2}}


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nome: x", r"unknown key 'nome'; allowed: deliberation, engine, model, name,"),
        ("search: {polcy: puct}", r"unknown key 'search.polcy'; allowed: .*num_actions, policy"),
        ("model: {backbone: {width: 3}}", r"unknown key 'model.backbone.width'; allowed: .*d_model"),
        ("tasks: [{name: path_star, legs: 3}]", r"unknown key 'tasks.0.path_star.legs'; allowed: arms, id, labels"),
        ("deliberation: {lag: -1}", r"deliberation.lag = -1: .*greater than or equal to 0"),
        ("deliberation: {injection_rate: 1.5}", r"deliberation.injection_rate = 1.5: .*less than or equal to 1"),
        ("deliberation: {injection_rate: -0.1}", r"deliberation.injection_rate = -0.1: .*greater than or equal to 0"),
        ("deliberation: {injection_rate: .nan}", r"deliberation.injection_rate = nan"),
        ("deliberation: {channel: loud}", r"deliberation.channel = 'loud': .*'state', 'policy', 'both' or 'off'"),
        ("planners: {count: -1}", r"planners.count = -1: .*greater than or equal to 0"),
        ("stage_1: {steps: 0}", r"stage_1.steps = 0: .*greater than or equal to 1"),
        ("stage_1: {steps: many}", r"stage_1.steps = 'many'"),
        ("model: {backbone: {d_model: 40, headdim: 32}}", r"headdim = 32 does not divide .* = 80; allowed: a divisor"),
        ("model: {world_model: {read_layers: [4]}}", r"read_layers = \(4,\); allowed: layers between 0 and 3"),
        ("model: {world_model: {read_layers: []}}", r"read_layers = \(\); allowed: .*at least one"),
        ("tasks: []", r"tasks = \[\]; allowed: at least one task"),
        ("tasks: [{name: tree_path}, {name: tree_path}]", r"each name once"),
        ("tasks: [{name: tree_path, plan: false}]", r"plan = false for all of tree_path; allowed: at least one task"),
        ("tasks: [{name: chess}]", r"'chess'.*'path_star', 'tree_path'"),
        ("tasks: [{name: path_star, arms: 9, length: 9}]", r"labels = 30; allowed: at least 73"),
        ("tasks: [{name: tree_path, depth: 5}]", r"labels = 30; allowed: at least 63"),
        ("- 1\n- 2", r"holds a list; allowed: a mapping"),
        ("just text", r"holds a str; allowed: a mapping"),
        ("a: [1", r"is not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_file_key_and_what_is_allowed(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_two_mistakes_are_both_named(tmp_path):
    with pytest.raises(ValueError, match=r"deliberation.lag = -1.*; .*stage_1.steps = 0"):
        parse_config(yaml.safe_load("{deliberation: {lag: -1}, stage_1: {steps: 0}}"), "here")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'.*/none.yaml' cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_settings_cannot_be_changed_once_made():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1
