"""The list of methods: read from their source, the same as what they say once they are imported."""

import json
import subprocess
import sys

import pytest

from agentrl.algorithms.catalogue import describe_parts, list_methods
from agentrl.algorithms.recipe import recipe_names

CODE = """
import sys
from agentrl.cli import main
try:
    main(["algorithms", "--json"])
except SystemExit as end:
    assert not end.code
loaded = [name for name in ("torch", "transformers", "ray") if name in sys.modules]
assert not loaded, loaded
"""


def test_the_list_is_read_without_importing_torch_and_names_every_method() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    listed = json.loads(done.stdout)
    assert sorted(method["name"] for method in listed) == recipe_names()
    steer = next(method for method in listed if method["name"] == "steer")
    assert steer["kind"] == "token selection"
    assert steer["confidence"] == "official code read"
    assert steer["source"] == "Hao et al. 2025, arXiv:2510.10150"


def test_what_is_read_is_what_the_imported_methods_say() -> None:
    assert list_methods() == list_methods(imported=True)
    unsaid = [method.name for method in list_methods() if method.kind is None]
    assert unsaid == []


def test_methods_stand_in_the_order_of_their_kinds() -> None:
    kinds = [method.kind for method in list_methods()]
    assert kinds == sorted(kinds, key=kinds.index)
    assert kinds[0] == "credit"


@pytest.mark.parametrize(
    ("name", "change", "needs"),
    [
        ("steer", "weights: steer", "current"),
        ("empg", "transforms: EMPG.modulate", "turn_entropy"),
        ("kl_cov", "clip: none", "current"),
        ("epo", "terms: epo_entropy, epo_smoothing", "entropy:grad"),
    ],
)
def test_a_method_names_its_parts(name: str, change: str, needs: str) -> None:
    parts = describe_parts(name)
    assert change in parts["changes"]
    assert needs in parts["requires"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_method_can_be_described(name: str) -> None:
    assert set(describe_parts(name)) == {"changes", "requires", "refuses"}


def test_what_excludes_a_method_is_said_with_the_reason() -> None:
    assert any(
        line.startswith("advantage within a turn: EMPG scales") for line in describe_parts("empg")["refuses"]
    )
