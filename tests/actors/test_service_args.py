"""Arguments of the served application: what is refused and how, and that every file under configs is one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.service_args import SERVE_ENVIRONMENT, ServiceArgs, check_exposure, is_loopback, parse_args
from actors.serving.settings import ServeSettings

CONFIGS = Path(__file__).parents[2] / "configs"
MANIFEST = CONFIGS / "kubernetes" / "ray_service.yaml"
SERVE_FILES = sorted((CONFIGS / "serve").glob("*.yaml"))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"checkpiont": "nano"}, "args: unknown key 'checkpiont'; allowed: autoscaling, checkpoint, config,"),
        ({"server": {"max_token": 5}}, "args: unknown key 'server.max_token'; allowed: api_key_file, api_keys,"),
        ({"autoscaling": {"replicas": 2}}, "unknown key 'autoscaling.replicas'; allowed: max_replicas, min_replicas"),
        ({"replicas": 0}, "args: replicas = 0: Input should be greater than or equal to 1"),
        ({"planners": "many"}, "args: planners = 'many': Input should be a valid integer"),
        ({"replicas": 2, "autoscaling": {}}, "replicas = 2 with autoscaling; allowed: one of them"),
        ({"autoscaling": {"min_replicas": 5}}, "max_replicas = 4; allowed: at least min_replicas = 5"),
        ({"drain_seconds": float("inf")}, "args: drain_seconds = inf: "),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_args(tree)


def test_a_complaint_about_keys_does_not_tell_them() -> None:
    with pytest.raises(ValueError) as refused:
        parse_args({"server": {"api_keys": [["secret-key"]]}})
    assert "api_keys" in str(refused.value) and "secret" not in str(refused.value)


def test_what_a_command_line_hands_over_as_text_is_read() -> None:
    args = parse_args({"checkpoint": "nano", "replicas": "2", "planners": "0"})
    assert (args.replicas, args.planners) == (2, 0)


def test_sessions_are_pinned_where_there_are_several_replicas() -> None:
    assert not ServiceArgs().pins_sessions
    assert ServiceArgs(replicas=2).pins_sessions and parse_args({"autoscaling": {}}).pins_sessions
    assert not ServiceArgs(replicas=2, sessions=False).pins_sessions


def test_a_replica_may_take_as_long_to_end_as_a_request() -> None:
    args = parse_args({"server": {"max_deadline": 100}})
    assert args.graceful_seconds > 100
    assert ServiceArgs(drain_seconds=5).graceful_seconds < 20
    assert args.places > 10 * args.server.max_concurrent, "it is the front that turns requests away"


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("example.org", False),
    ],
)
def test_beyond_this_machine_there_must_be_a_key(host: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRSM_API_KEYS", raising=False)
    assert is_loopback(host) is own
    check_exposure(host, ServeSettings(api_keys=("k",)))
    if own:
        check_exposure(host, ServeSettings())
        return
    with pytest.raises(ValueError, match="is open to others, and there is no API key"):
        check_exposure(host, ServeSettings())
    monkeypatch.setenv("CRSM_API_KEYS", "k")
    check_exposure(host, ServeSettings())


# ---------------------------------------------------------------------------------------------------------- the files


def check_serve_config(tree: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(tree)
    (application,) = schema.applications
    assert application.import_path == "actors.service:build"
    args = parse_args(dict(application.args), application.name)
    if not is_loopback(schema.http_options.host):
        assert args.server.keys({"CRSM_API_KEYS": "k"}), "keys come from the environment"
    known = set(type(schema.http_options).model_fields), set(type(application).model_fields)
    assert set(tree["http_options"]) <= known[0] and set(tree["applications"][0]) <= known[1], "Serve ignores others"


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.name)
def test_every_serve_config_is_one(path: Path) -> None:
    check_serve_config(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_settings_of_every_serve_config_fit_its_checkpoint() -> None:
    from actors.service import open_checkpoint, planners_config

    for path in SERVE_FILES:
        args = parse_args(yaml.safe_load(path.read_text(encoding="utf-8"))["applications"][0]["args"])
        checkpoint = open_checkpoint(args)
        assert checkpoint.config.engine.clock == "wall"
        planners = planners_config(args, checkpoint)
        assert planners.count == args.planners and planners.max_count == args.max_planners


def test_the_manifest_holds_the_serve_config_and_the_environment() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    tree = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    check_serve_config(tree)
    assert tree == yaml.safe_load((CONFIGS / "serve" / "kubernetes.yaml").read_text(encoding="utf-8"))
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment.items() >= SERVE_ENVIRONMENT.items()
        keys = next(entry for entry in container["env"] if entry["name"] == "CRSM_API_KEYS")
        assert keys["valueFrom"]["secretKeyRef"] == {"name": "crsm-api-keys", "key": "keys"}
    args = parse_args(tree["applications"][0]["args"])
    grace = cluster["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= args.graceful_seconds


def test_the_dashboard_shows_every_metric_under_the_name_that_ray_gives_it() -> None:
    from actors.metrics import METRICS

    dashboard = json.loads((CONFIGS / "grafana" / "crsm.json").read_text(encoding="utf-8"))
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    exported = {f"ray_{name}{suffix[metric.kind]}" for name, metric in METRICS.items()}
    assert set(re.findall(r"\bray_\w+", queries)) == exported
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
