"""Shares of a GPU on a local Ray: what is reserved, and what is refused. The GPU is one in Ray's books only."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray

from actors.generator import start_generator, stop_generator
from actors.rollouts import RolloutActor
from actors.weights import pack
from crsm.config import EngineConfig, PlannersConfig
from crsm.engine import Engine
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from tests.actors.helpers import generations, run, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_gpu")]

AUTO = EngineConfig(device="auto")


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=1,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def test_generator_and_planners_take_their_shares_and_say_what_they_say_without(checkpoint: Checkpoint) -> None:
    (request, *_) = generations(tokens=12, lag=0)
    want = run(Engine(checkpoint, InlinePlanners(Deliberator.from_checkpoint(checkpoint))), [request])
    generator = start_generator(checkpoint, PlannersConfig(count=2, num_gpus=0.25, device="auto"), AUTO, num_gpus=0.5)
    try:
        assert ray.get(generator.wait_until_ready.remote(120.0)) == 2
        until(lambda: ray.available_resources().get("GPU", 0.0) == 0.0)
        references = generator.generate.remote(
            request.prompt, request.sampling, request.deliberation, request.simulations, request.generation_id
        )
        said = [token.token for reference in references for token in ray.get(reference)]
        assert said == [token for token, _ in want[request.generation_id]]
    finally:
        stop_generator(generator)
    until(lambda: ray.available_resources().get("GPU", 0.0) == 1.0)


def test_more_than_the_cluster_has_is_refused_before_anything_starts(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ValueError, match=r"a generator with 0\.5 GPU and 3 planners with 0\.25 each asks 2 GPU; .* has 1"
    ):
        start_generator(checkpoint, PlannersConfig(count=3, num_gpus=0.25), AUTO, num_gpus=0.5)
    with pytest.raises(ValueError, match=r"engine\.device = 'cuda' with the generator's num_gpus = 0"):
        start_generator(checkpoint, PlannersConfig(count=0), EngineConfig(device="cuda"))


def test_roll_outs_use_no_gpu_that_is_not_reserved(checkpoint: Checkpoint) -> None:
    settings = {"engine": EngineConfig(device="cuda"), "planners": PlannersConfig(device="cuda")}
    actor = RolloutActor(pack(checkpoint), checkpoint.config.model_copy(update=settings), 1)
    config = actor._checkpoint.config
    assert (config.engine.device, config.planners.device) == ("cpu", "cpu")
