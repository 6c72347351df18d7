"""An algorithm that reads every kind of feature, and episodes in which these differ."""

import random
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import turns_to_tokens
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, Term, requires
from agentrl.algorithms.named_features import feature_of
from agentrl.data import Episode, Group, Turn
from agentrl.data.batch import Batch

BY_TURN = ("states", "history_states:1", "state_visits", "success_distance", "turn_entropy", "branch_weights")
BY_EPISODE = ("answer_clusters", "answer_entropy", "episode_entropy", "episode_tokens", "group_entropy")


@requires(*BY_TURN, *BY_EPISODE, "entropy_quantile:0.8")
def add_features(advantages: Tensor, batch: Batch, context: Context) -> Tensor:
    """Adds a tenth of every feature to the advantage."""
    width = feature_of(batch, "states").shape[1]
    table = sum(feature_of(batch, name)[:, :width].double() for name in BY_TURN)
    table = table + sum(feature_of(batch, name).double() for name in BY_EPISODE)[:, None]
    return advantages + 0.1 * turns_to_tokens(table + feature_of(batch, "entropy_quantile:0.8"), batch)


@requires("covariance", "success_distance:0.5")
def weigh(mini: MiniBatch, context: Context) -> Tensor:
    distances = turns_to_tokens(feature_of(mini, "success_distance:0.5").double(), mini.batch)
    return 1 / (1 + distances + feature_of(mini, "covariance").abs())


@requires("covariance", "states")
def entropy_loss(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    states = turns_to_tokens(feature_of(mini, "states").double(), mini.batch)
    return outputs.logprobs * (feature_of(mini, "covariance") + states)


def reading_features() -> Algorithm:
    return Algorithm(transforms=(add_features,), weights=(weigh,), terms=(Term("read", entropy_loss, 0.1),))


def wander(groups: Sequence[Group]) -> list[Group]:
    """Gives each turn one of three observations and two actions, and success to every other episode."""

    def turn(place: Turn, draw: random.Random) -> Turn:
        return replace(place, observation=draw.choice("abc"), action=draw.choice("xy"))

    def episode(played: Episode, index: int) -> Episode:
        draw = random.Random(played.id)
        turns = tuple(turn(each, draw) for each in played.turns)
        return replace(played, turns=turns, success=index % 2 == 1, final_observation=draw.choice("abc"))

    return [
        replace(group, episodes=tuple(episode(each, int(each.id.split("-")[1])) for each in group.episodes))
        for group in groups
    ]
