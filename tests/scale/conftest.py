"""Fixtures: the environments of the `rollout` tests, and one Ray for all tests that need it."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that share one Ray last: the others start their own, or need none."""
    items.sort(key=lambda item: "ray_is_there" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def ray_is_there() -> Iterator[None]:
    """Start Ray on this machine, and check that no process of it is left at the end."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    from agentrl.scale.cluster import connected

    before = children()
    with connected(None):
        yield
    wait_for(lambda: children() <= before)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)
