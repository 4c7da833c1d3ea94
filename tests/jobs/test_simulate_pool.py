"""The job: its result, its picture, and the sizes that it states."""

from __future__ import annotations

import json
from pathlib import Path

from jobs import simulate_pool
from jobs.command import invoke


def test_the_same_seed_writes_the_same_figures_and_a_picture(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        arguments = ["--quick", "--seconds", "0.2", "--json", str(tmp_path / name), "--plot", str(tmp_path / "p.png")]
        assert invoke(simulate_pool.main, arguments) == 0
        rows.append(json.loads((tmp_path / name).read_text())["results"]["rows"])
    assert rows[0] == rows[1] and len(rows[0]) == 8
    assert all(0 <= row["in_time_rate"] <= row["hit_rate"] <= row["asked"] <= 1 for row in rows[0])
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_request_of_the_1_3b_shape_is_as_large_as_its_arrays() -> None:
    # 48 · 2048 + 4 · 4096 · 128 numbers.
    assert simulate_pool.request_bytes(4, 2) == 2 * (98_304 + 2_097_152) == 4_390_912
    assert simulate_pool.request_bytes(48, 4) == 4 * (98_304 + 25_165_824)


def test_a_picture_of_a_kind_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    assert invoke(simulate_pool.main, ["--plot", str(tmp_path / "p.txt")]) == 2
