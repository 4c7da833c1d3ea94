"""The fleet that rolls out problems: results in order, deaths made good, and not for ever."""

import pytest
import ray

from actors.rollouts import MAX_TRIES, RolloutJob, run_fleet

pytestmark = pytest.mark.ray


def job(first):
    return RolloutJob("path_star", "train", 0, first, 2, 1, 0.0, 0)


def fake_class():
    """Actors that die once over every job whose ``first`` is in ``mortal``, or always if ``always``. Made inside a
    function, so that workers get its code with the actor and need not import this file."""

    class Fake:
        def __init__(self, folder, mortal, always):
            if always == "from the start":
                raise OSError("no weights here")
            self.folder, self.mortal, self.always = folder, mortal, always

        def roll_out(self, job):
            import os

            mark = self.folder / str(job.first)
            if job.first in self.mortal and (self.always or not mark.exists()):
                mark.touch()
                os._exit(1)
            if job.first == 99:
                raise ValueError("no such problem")
            return [{"index": job.first + i} for i in range(job.count)]

    return Fake


def fleet(folder, jobs, mortal=(), always=False, seen=None):
    remote = ray.remote(num_cpus=0.1)(fake_class())
    on_done = (lambda done, deaths: seen.append((done, deaths))) if seen is not None else (lambda done, deaths: None)
    return run_fleet(jobs, lambda: remote.remote(folder, set(mortal), always), 2, on_done)


def test_records_come_in_the_order_of_the_jobs_whoever_dies(cluster, tmp_path):
    seen = []
    records = fleet(tmp_path, [job(first) for first in range(0, 12, 2)], mortal=(2, 6), seen=seen)
    assert [record["index"] for record in records] == list(range(12))
    assert seen[-1] == (6, 2)


def test_a_job_that_kills_every_actor_is_given_up(cluster, tmp_path):
    with pytest.raises(RuntimeError, match=f"{MAX_TRIES} actors died over it"):
        fleet(tmp_path, [job(0), job(2)], mortal=(2,), always=True)


def test_actors_for_which_there_is_no_room_hold_nobody_up(cluster, tmp_path):
    remote = ray.remote(num_cpus=0.1)(fake_class())
    nowhere = remote.options(resources={"a node that is gone": 1})
    made = iter([remote, nowhere, nowhere])
    jobs = [job(first) for first in range(0, 6, 2)]
    records = run_fleet(jobs, lambda: next(made).remote(tmp_path, set(), False), 3)
    assert [record["index"] for record in records] == list(range(6))


def test_actors_that_never_start_are_given_up(cluster, tmp_path):
    with pytest.raises(
        RuntimeError, match=rf"{MAX_TRIES} actors in a row died as they started: (.|\n)*no weights here"
    ):
        fleet(tmp_path, [job(0), job(2)], always="from the start")


def test_an_error_in_a_job_is_the_callers(cluster, tmp_path):
    with pytest.raises(ValueError, match="no such problem"):
        fleet(tmp_path, [job(99)])
