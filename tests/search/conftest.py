"""Every test of this folder runs with both engines, unless it names one itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crsm import native
from crsm.search import search


@pytest.fixture(scope="module", autouse=True, params=["python", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and not native.available():
        pytest.skip(native.MISSING)
    defaults = search.__kwdefaults__
    kept, defaults["engine"] = defaults["engine"], request.param
    yield request.param
    defaults["engine"] = kept
