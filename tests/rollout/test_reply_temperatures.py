"""Temperatures of replies and tokens, from the hook of an algorithm to the learner's ratio."""

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from shelves import Shelves
from test_branching import Script, at
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.algorithms.algorithm import Algorithm, token_ratio
from agentrl.algorithms.hooks import (
    Context,
    MiniBatch,
    Outputs,
    ReplyState,
    ReplyTemperature,
    TokenTemperature,
    requires,
)
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.algorithms.self_imitation import decayed
from agentrl.data.batch import Layout, collate
from agentrl.data.trajectory import Episode, Group, Turn
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig
from agentrl.policy.engine import SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import RoleDialogue, fit_tokenizer
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.branching import BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, EpisodeSpec
from agentrl.rollout.players import LanguagePlayer
from agentrl.run.settings import load_config
from agentrl.training.rollouts import reply_sampling

ACTIONS = ["go on", "go up", "take mug 1", "take mug 2", "take pen 1", "take pen 2"]
SAMPLING = SamplingParams(temperature=0.9, max_tokens=6)


class Shop(Shelves):
    """Shelves, with actions that begin alike."""

    def info(self) -> dict[str, Any]:
        return super().info() | {"actions": ACTIONS}


def last_entropy(turn: Turn | None) -> float:
    """Return the entropy of a turn's last decision; 0 without any."""
    return turn.action_entropies[-1] if turn is not None and turn.action_entropies else 0.0


@requires("rollout:entropy")
def by_member_and_last_entropy(state: ReplyState, context: Context) -> float:
    return state.temperature * (1 + state.member / 4) + last_entropy(state.previous) / 4


def follow(entropy: float) -> float:
    return 0.6 + entropy / 3


@requires("rollout:entropy", "rollout:token_temperature")
def by_token(state: ReplyState, context: Context) -> TokenTemperature:
    return TokenTemperature(by_member_and_last_entropy(state, context), follow)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fit_tokenizer([*ACTIONS, "4 shelves", "3 left", "2 left", "1 left"] * 4, 290)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = build_model(PolicyConfig(device="cpu", max_context=256, initial_std=0.02), tokenizer, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4.0)
    return model


def played(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    hook: ReplyTemperature,
    *,
    choices: bool = True,
    scheduler: BranchScheduler | None = None,
) -> tuple[Episode, ...]:
    """A group of four episodes of four turns each, or what the scheduler starts."""
    dialogue = RoleDialogue(tokenizer)
    engine = TorchEngine(model, stop_ids=dialogue.stop_ids)
    choose = partial(reply_sampling, hook, Context(), load_config())
    player = LanguagePlayer(dialogue, engine, SAMPLING, choices=choices, choose_sampling=choose)
    specs = [EpisodeSpec(f"a-{member}", "test/Shelves-v0", "4", 7, member=member) for member in range(4)]
    started = () if scheduler else specs
    return collect(started, player, EnvironmentPool(Shop), max_active=8, scheduler=scheduler).episodes


def wanted(episode: Episode, member: int) -> Iterator[float]:
    """Yield the temperature of the first decision of each turn."""
    for previous in (None, *episode.turns[:-1]):
        yield SAMPLING.temperature * (1 + member / 4) + last_entropy(previous) / 4


def learner_of(model: PreTrainedModel, micro_batch_tokens: int = 100) -> Learner:
    return Learner(model, LearnerConfig(micro_batch_tokens=micro_batch_tokens))


@pytest.mark.parametrize("choices", [True, False])
def test_a_reply_records_the_temperature_that_the_algorithm_chose_for_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: bool
) -> None:
    episodes = played(model, tokenizer, by_member_and_last_entropy, choices=choices)
    for member, episode in enumerate(episodes):
        assert [turn.temperature for turn in episode.turns] == list(wanted(episode, member))
        assert not any(turn.temperatures for turn in episode.turns)
    assert len({turn.temperature for episode in episodes for turn in episode.turns}) == 4 * 4


@pytest.mark.parametrize("choices", [True, False])
def test_a_token_records_the_temperature_that_followed_from_the_decision_before(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: bool
) -> None:
    episodes = played(model, tokenizer, by_token, choices=choices)
    for member, episode in enumerate(episodes):
        for turn, first in zip(episode.turns, wanted(episode, member), strict=True):
            used = turn.temperatures or (turn.temperature,) * len(turn.action_ids)
            decided = [value for value, own in zip(used, turn.action_mask, strict=True) if own]
            assert turn.temperature == first
            assert decided == [first, *map(follow, turn.action_entropies[:-1])][: len(decided)]
    assert any(turn.temperatures for episode in episodes for turn in episode.turns)


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("hook", [by_member_and_last_entropy, by_token])
def test_the_learner_has_the_engines_numbers_and_an_unchanged_policy_a_ratio_of_one(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    hook: ReplyTemperature,
    choices: bool,
    layout: Layout,
) -> None:
    batch = collate([Group("4", played(model, tokenizer, hook, choices=choices))], layout=layout)
    scored = learner_of(model).score(batch)
    assert scored.old_logprobs is not None
    assert scored.old_entropies is not None
    torch.testing.assert_close(scored.old_logprobs, batch.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored.old_entropies, batch.entropies, rtol=0, atol=1e-5)
    again = learner_of(model).score(batch)
    current = Outputs(again.old_logprobs, again.old_entropies)
    ratio = token_ratio(current, MiniBatch(scored, torch.zeros_like(batch.logprobs)))
    assert torch.equal(ratio, torch.ones_like(ratio))
    split = learner_of(model, micro_batch_tokens=1).score(batch.select(range(len(batch.lengths))[::-1]))
    torch.testing.assert_close(split.old_logprobs.flip(0), scored.old_logprobs, rtol=0, atol=1e-5)
    blind = learner_of(model).score(replace(batch, temperatures=None))
    assert (blind.old_logprobs - batch.logprobs).abs().max() > 0.02


def test_branches_are_members_of_their_group_and_given_tokens_keep_the_parents_turns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    script = Script({"a-0": [at("a-0", 2), at("a-0", 1, 1)]})
    scheduler = BranchScheduler([EpisodeSpec("a", "test/Shelves-v0", "4", 7)], [script], episodes=3)
    first, second, third = played(model, tokenizer, by_token, scheduler=scheduler)
    assert second.turns[:2] == first.turns[:2]
    assert third.turns[:1] == first.turns[:1]
    for member, child, turn in ((1, second, 2), (2, third, 1)):
        begun = last_entropy(child.turns[turn - 1])
        assert child.turns[turn].temperature == SAMPLING.temperature * (1 + member / 4) + begun / 4
    batch = collate([Group("4", (first, second, third))])
    # The token that the third was given was drawn by the first, and is no decision of its own.
    torch.testing.assert_close(learner_of(model).score(batch).old_logprobs, batch.logprobs, rtol=0, atol=1e-5)


def test_replayed_rows_are_scored_at_the_temperatures_that_they_were_sampled_at(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def buffer() -> ReplayBuffer:
        return ReplayBuffer(
            lambda algorithm: algorithm,
            size=4,
            baselines=10,
            tolerance=5,
            coefficient=lambda context: 1.0,
            recompute_advantage=partial(decayed, factor=1.0),
            count_all=True,
        )

    learner, memory, restored = learner_of(model), buffer(), buffer()
    for step, hook in enumerate((by_member_and_last_entropy, by_token)):
        scored = learner.score(collate([Group("4", played(model, tokenizer, hook))]))
        memory.update(MiniBatch(scored, scored.action_mask.float()), Context(step))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True), Context(2))
    replayed = restored.sample(Context(2))
    assert replayed is not None
    batch = replayed.batch
    assert batch.temperatures is not None
    assert {name.split("@")[1] for name in (episode.id for episode in batch.episodes)} == {"0", "1"}
    assert len(batch.temperatures[batch.action_mask].unique()) > 8
    torch.testing.assert_close(learner.score(batch).old_logprobs, batch.old_logprobs, rtol=0, atol=1e-6)


def test_stored_rows_of_older_versions_count_as_sampled_at_temperature_1(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    memory = ReplayBuffer(
        lambda _: Algorithm(),
        size=1,
        baselines=10,
        tolerance=5,
        coefficient=lambda context: 1.0,
        recompute_advantage=partial(decayed, factor=1.0),
        count_all=True,
    )
    scored = learner_of(model).score(collate([Group("4", played(model, tokenizer, by_token))]))
    memory.update(MiniBatch(scored, scored.action_mask.float()), Context())
    state = memory.state_dict()
    for row in state["rows"]:
        del row["tokens"]["temperatures"]
    memory.load_state_dict(state, Context())
    replayed = memory.sample(Context(1))
    assert replayed is not None
    assert (replayed.batch.temperatures == 1).all()


def request() -> ActionRequest:
    return ActionRequest("e-2", 3, "seen", None, {}, 1, task="4", member=2)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_above_0_names_the_reply(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"the temperature of e-2, turn 3 is {value}, wanted above 0"):
        reply_sampling(lambda state, context: value, Context(), load_config(), request(), SAMPLING)


def test_a_temperature_that_the_engine_does_not_sample_at_is_refused() -> None:
    config = load_config(None, "engine.name=vllm")
    with pytest.raises(ConfigError, match=r"turn 3 is 3.0, wanted within \[0\.01, 2\.0\]"):
        reply_sampling(lambda state, context: 3.0, Context(), config, request(), SAMPLING)


def test_a_hook_that_did_not_say_that_it_works_by_token_is_refused() -> None:
    def unmarked(state: ReplyState, context: Context) -> TokenTemperature:
        return TokenTemperature(1.0, follow)

    with pytest.raises(RequirementError, match=r"mark it with @requires\('rollout:token_temperature'\)"):
        reply_sampling(unmarked, Context(), load_config(), request(), SAMPLING)
