"""Lengths that a configuration leaves open are measured: nothing is cut, and passes fit into memory."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from chat_models import chat_model

import agentrl
from agentrl.data.trajectory import Episode
from agentrl.planning.env_probe import longest_sequence, play_random, tokenize_play
from agentrl.planning.limits import is_open, resolve_limits, text_misfits
from agentrl.training.setup import open_training_environments

CPU = torch.device("cpu")
Memory = namedtuple("Memory", "available")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), positions=4096)


@pytest.fixture(scope="module")
def config(examples: dict[str, ModuleType], model: Path) -> agentrl.RunConfig:
    return agentrl.load_config(
        None,
        *("env.id=example/HotCold-v0", f"policy.path={model}", "policy.device=cpu", "policy.dtype=float32"),
        *("rollout.placement=inline", "evaluation.split=test", "evaluation.tasks=2", "rollout.group_size=2"),
        warn=lambda line: None,
    )


@pytest.fixture(scope="module")
def episodes(config: agentrl.RunConfig) -> list[Episode]:
    with open_training_environments(config) as environments:
        with environments.borrow() as environment:
            tasks = environment.unwrapped.tasks("train")  # type: ignore[attr-defined]
        return play_random(config, environments, tasks)


def resolved(config: agentrl.RunConfig, episodes: list[Episode]) -> tuple[agentrl.RunConfig, list[str]]:
    return resolve_limits(config, config.algorithm.build(), episodes, CPU)


def test_the_context_holds_the_measured_episodes_and_half_as_much(
    config: agentrl.RunConfig, episodes: list[Episode]
) -> None:
    longest = longest_sequence(tokenize_play(config, episodes, 4096))
    found, notes = resolved(config, episodes)
    assert found.policy.max_context is not None
    assert 1.5 * longest <= found.policy.max_context < 1.5 * longest + 257
    assert f"policy.max_context={found.policy.max_context}" in notes[0]
    assert not is_open(found)
    assert list(text_misfits(found, episodes, 4096)) == []


def test_less_memory_gives_smaller_passes_and_never_less_than_a_sequence(
    config: agentrl.RunConfig, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for available in (8 * 2**30, 2**27, 2**20):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: Memory(available))
        found.append(resolved(config, episodes)[0].learner.micro_batch_tokens)
    assert found == sorted(found, reverse=True)
    assert found[0] == 4096
    assert found[-1] == resolved(config, episodes)[0].policy.max_context


def test_given_lengths_are_kept(config: agentrl.RunConfig, episodes: list[Episode]) -> None:
    block = replace(config.policy, max_context=700)
    learner = replace(config.learner, micro_batch_tokens=900)
    found, notes = resolved(replace(config, policy=block, learner=learner), episodes)
    assert (found.policy.max_context, found.learner.micro_batch_tokens) == (700, 900)
    assert len(notes) == 0


def test_lengths_that_cut_what_was_measured_are_named(
    config: agentrl.RunConfig, episodes: list[Episode]
) -> None:
    block = replace(config.policy, max_context=60, max_observation_tokens=3)
    cut, ended = text_misfits(replace(config, policy=block), episodes, 4096)
    assert cut.startswith("policy.max_observation_tokens=3 cuts the first observation of 4 in 4 episodes")
    assert ended.startswith("policy.max_context=60 ends 4 of 4 random episodes")


def test_a_run_measures_the_lengths_that_its_configuration_leaves_open(
    config: agentrl.RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(
        config,
        run=replace(config.run, folder=str(tmp_path), name="short"),
        trainer=replace(config.trainer, steps=1),
        rollout=replace(config.rollout, groups_per_step=1),
        evaluation=replace(config.evaluation, baselines=(), instruction_check=False),
    )
    run = agentrl.train(short)
    stored = agentrl.open_run(run.folder).config
    assert stored.policy.max_context is not None
    assert stored.learner.micro_batch_tokens is not None
    said = capsys.readouterr().out
    assert f"policy.max_context={stored.policy.max_context}: the longest sequence of 4 random" in said
    assert f"learner.micro_batch_tokens={stored.learner.micro_batch_tokens}: as many as" in said
