"""The worker that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pretended_gpu.loading import missing
from tests.pretended_gpu.worker import Worker


@pytest.fixture(scope="session")
def gpu() -> Iterator[Worker]:
    """A process with a pretended GPU; skipped, with the reason, where it cannot be built."""
    if why := missing():
        pytest.skip(why)
    worker = Worker()
    yield worker
    worker.close()
