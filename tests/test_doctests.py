"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"agentrl": ROOT, "envs/agentrl_envs": ROOT / "envs"}
MODULES = [
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    for package, base in PACKAGES.items()
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0, "no docstring holds this file's >>>"
    assert result.failed == 0


def test_both_packages_have_examples() -> None:
    assert {name.partition(".")[0] for name in MODULES} == {"agentrl", "agentrl_envs"}
