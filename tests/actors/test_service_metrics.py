"""What the front of a replica counts."""

from __future__ import annotations

from actors.service_metrics import ServiceTelemetry
from tests.actors.noted import Noted


def test_tokens_are_summed_up_and_handed_on_together() -> None:
    noted, now = Noted(), [0.0]
    telemetry = ServiceTelemetry(noted, clock=lambda: now[0])  # type: ignore[arg-type]
    telemetry.first_token(0.05)
    telemetry.tokens(3, None)
    telemetry.tokens(4, 0.02)
    telemetry.tokens(1, 0.03)  # at the same time: times are sampled, tokens are not
    telemetry.generations(2, 1)
    telemetry.request("/v1/completions", 200, 1.5)
    assert ("crsm_tokens",) not in noted.sums
    telemetry.flush()
    assert noted.sums[("crsm_tokens",)] == 8
    assert noted.gauges == {("crsm_generations_running",): 2, ("crsm_generations_waiting",): 1}
    assert noted.sums["crsm_requests", "/v1/completions", "200"] == 1
    assert noted.seen == [
        ("crsm_first_token_seconds", 0.05),
        ("crsm_inter_token_seconds", 0.02),
        ("crsm_request_seconds", 1.5),
    ]
    telemetry.flush()
    assert noted.sums[("crsm_tokens",)] == 8
