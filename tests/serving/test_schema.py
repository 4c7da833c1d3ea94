"""What ``/openapi.json`` says is true: requests made from it are answered as it says."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from actors.serving.answers import Error
from crsm.data.tokenizer import Tokenizer
from tests.serving.fakes import FakeBackend, an_app, ask, complete

schemathesis = pytest.importorskip("schemathesis")

SOME, MANY = 25, 160
"""Cases of each of the 16 operations: about 300, and more than 2,000."""


def document(**settings: Any) -> dict[str, Any]:
    return dict(ask(an_app(**settings), "GET", "/openapi.json").json())


def test_every_path_says_what_it_takes_and_how_it_may_fail() -> None:
    schema = document(max_lag=9, api_keys=("key",))
    assert set(schema["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/states",
        "/v1/states/{state_id}",
        "/v1/states/{state_id}/fork",
        "/v1/crsm/info",
        "/v1/crsm/problems/{task}",
        "/v1/crsm/check",
        "/v1/crsm/planners",
        "/healthz",
        "/readyz",
    }
    assert "422" not in json.dumps(schema["paths"])
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            protected = path.startswith("/v1")
            assert ("401" in operation["responses"]) == ("security" in operation) == protected, path
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith(f"/{Error.__name__}")
            assert ("requestBody" in operation) == (method in ("post", "put")), path
    lag = schema["components"]["schemas"]["CrsmOptions"]["properties"]["lag"]
    assert {"type": "integer", "minimum": 0, "maximum": 9} in [
        {name: choice[name] for name in choice if name != "exclusiveMaximum"} for choice in lag["anyOf"]
    ]
    assert "text/event-stream" in schema["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]


def test_all_references_lead_somewhere() -> None:
    schema = document()
    known = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    text = json.dumps(schema)
    used = {part.split('"')[0] for part in text.split('"$ref": "')[1:]}
    assert used <= known and "security" not in text


def check_operations(cases: int) -> dict[int, int]:
    """Tries every operation with bodies and parameters that fit the schema and that do not; answers by status."""
    tokenizer = Tokenizer.train_bpe(["any text"], 300)  # a closed vocabulary knows hardly a word that is drawn
    backend = FakeBackend(tokenizer=tokenizer, answer=lambda request: range(100, 100 + request.sampling.max_tokens))
    app = an_app(backend, max_tokens=50, max_deadline=5)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [
        schemathesis.checks.not_a_server_error,
        *schemathesis.checks.CHECKS.get_by_names(
            ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
        ),
    ]
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks)

    bounded = settings(
        max_examples=cases,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
        derandomize=True,
    )
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            try:
                bounded(given(case=operation.as_strategy(generation_mode=mode))(check))()
            except Unsatisfiable:  # nothing can be wrong with a request that has no parameters
                assert mode is schemathesis.GenerationMode.NEGATIVE
    answer = complete(app, max_tokens=2)
    assert answer.status_code == 200 and len(app.state.front.admission) == 0
    return statuses


def test_requests_made_from_the_schema_are_answered_as_it_says() -> None:
    statuses = check_operations(SOME)
    assert statuses.total() >= 300 and statuses[200] > 50 and statuses[400] > 50, statuses


@pytest.mark.slow
def test_very_many_requests_made_from_the_schema_are_answered_as_it_says() -> None:
    statuses = check_operations(MANY)
    assert statuses.total() >= 2_000 and statuses[200] > 300 and statuses[400] > 300, statuses
