"""Mistakes in `rollout.ray` are reported before anything starts; no test needs Ray."""

import sys
from pathlib import Path
from typing import Any

import pytest
from worker_worlds import Corridor, Heavy

import agentrl
from agentrl.config import to_yaml
from agentrl.errors import ConfigError, MissingDependencyError
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.env_backend import open_environments
from agentrl.run.settings import config_tree, load_config


@pytest.mark.parametrize("address", ["nowhere", "ray://host:10001", ":6379", "host:port"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match=r'rollout.ray.address is .*, wanted "host:port", "auto" or null'):
        load_config(None, "rollout.backend=ray", f"rollout.ray.address={address}")


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head.cluster:6379", "auto", "null"])
def test_addresses_are_taken_as_they_are(address: str, tmp_path: Path) -> None:
    config = load_config(None, "rollout.backend=ray", f"rollout.ray.address={address}")
    assert config.rollout.ray.address == (None if address == "null" else address)
    (tmp_path / "again.yaml").write_text(to_yaml(config_tree(config)))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("wrong", ["actors=0", "cpus=-1", "max_restarts=-1"])
def test_numbers_below_their_least_are_refused(wrong: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"rollout.ray.{wrong.partition('=')[0]}: wrong value \(got -?[01],"
    ):
        load_config(None, f"rollout.ray.{wrong}")


@pytest.mark.parametrize("placement", ["inline", "thread"])
def test_a_cluster_plays_in_processes_only(placement: str) -> None:
    with pytest.raises(ConfigError, match=f"backend is ray, but rollout.placement={placement} plays in this"):
        load_config(None, "rollout.backend=ray", f"rollout.placement={placement}")


@pytest.mark.parametrize(("make", "each"), [(Corridor, None), (Heavy, 1)])
def test_auto_is_a_process_on_a_cluster_and_heavy_ones_still_get_one_each(
    make: Any, each: int | None
) -> None:
    config, note = resolve_placement(make, RolloutConfig(backend="ray"), "train")
    assert (config.backend, config.placement, config.workers.environments) == ("ray", "process", each)
    assert "placement process: a call takes" in str(note)


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("agentrl.scale.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"backend=ray needs Ray: pip install -e '\.\[ray\]'"):
        open_environments(Corridor, RolloutConfig(backend="ray"))


def test_this_machine_does_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with open_environments(Corridor, RolloutConfig(placement="inline")) as environments:
        assert isinstance(environments, EnvironmentPool)


def test_an_explicit_placement_measures_a_run_of_a_cluster_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cluster = load_config(None, "rollout.backend=ray", "rollout.ray.address=10.0.0.1:6379")
    monkeypatch.setattr(
        "agentrl.run.policies.open_player",
        lambda name, **kwargs: (agentrl.rollout.players.RandomPlayer(), on_cluster),
    )
    found = agentrl.evaluate("random", tasks=1, placement="inline")
    assert found.aborted == 0
