"""Published numbers are checked twice: they hold with the method, and fail with its base in its place."""

from collections.abc import Callable, Generator
from typing import Any

import pytest

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.recipe import build_recipe

Build = Callable[..., Algorithm]


def build_method(name: str, **settings: Any) -> Algorithm:
    """The algorithm of a recipe."""
    return build_recipe(name, settings).build()


def build_base(name: str, **settings: Any) -> Algorithm:
    """The algorithm of a recipe's base, which is `grpo` where it has none of its own."""
    return getattr(build_recipe(name, settings), "base", build_recipe("grpo")).build()


@pytest.fixture
def build() -> Build:
    return build_method


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a test of a published number that takes `build` again, where it has to fail, with the base."""
    result = yield
    if pyfuncitem.get_closest_marker("vector") and "build" in pyfuncitem.fixturenames:
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        try:
            pyfuncitem.obj(**arguments | {"build": build_base})
        except AssertionError:
            return result
        pytest.fail("the numbers of the method are those of its base: the test would not notice its absence")
    return result
