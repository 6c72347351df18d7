"""Measure the novelty of observations within their episode and among all earlier steps."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agentrl.algorithms import functional
from agentrl.algorithms.features import played_turns
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.states import VisitCounts, normalise
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode
from agentrl.errors import CheckpointError

Episodic = Literal["elliptical", "count", "none"]
Across = Literal["rnd", "count", "none"]
Combine = Literal["mult", "add"]

FEATURES = 64  # numbers of a text


@lru_cache(4096)
def text_features(observation: str) -> Tensor:
    """Return a fixed random projection of the words and pairs of words of an observation; [64] float64.

    Each word and each pair gets a random sign and one of 64 places by its hash; the sum has length 1, or is 0
    for an empty text. Nothing is trained, and the same text has the same features on every machine.
    """
    words = normalise(observation).split()
    found = torch.zeros(FEATURES, dtype=torch.float64)
    for part in (*words, *map(" ".join, pairwise(words))):
        number = _hash(part)
        found[number // 2 % FEATURES] += 1 - 2 * (number % 2)
    return torch.nn.functional.normalize(found, dim=0)


@lru_cache(65536)
def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class RandomNetwork:
    """Random network distillation: a network learns what another one, which stays as it is, says of a text.

    The distance between the two is small for texts like those that it learned from. Both are the same on
    every rank, since they are on the CPU and begin with weights of a seed of their own.

    Args:
        hidden: The width of the hidden layer.
        learning_rate: That of Adam.
        steps: The gradient steps on the texts of each training step.
    """

    def __init__(self, hidden: int, learning_rate: float, steps: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._target, self._predictor = (
                nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, FEATURES)).double()
                for _ in range(2)
            )
        self._target.requires_grad_(False)
        self._optimizer = torch.optim.Adam(self._predictor.parameters(), lr=learning_rate)
        self._steps = steps

    def errors(self, features: Tensor) -> Tensor:
        """Return the distance between the outputs of both; [N] float64 without gradient."""
        with torch.no_grad():
            found: Tensor = torch.linalg.vector_norm(
                self._predictor(features) - self._target(features), dim=1
            )
        return found

    def learn(self, features: Tensor) -> None:
        """Take the gradient steps on the mean squared distance."""
        with torch.enable_grad():
            for _ in range(self._steps):
                self._optimizer.zero_grad()
                distance = (self._predictor(features) - self._target(features)).square().sum(dim=1).mean()
                distance.backward()
                self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the state of the optimiser."""
        return {"predictor": dict(self._predictor.state_dict()), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            CheckpointError: If they are of another width.
        """
        try:
            self._predictor.load_state_dict(state["predictor"])
        except RuntimeError as error:
            raise CheckpointError(f"the random network has another width: {error}") from error
        self._optimizer.load_state_dict(state["optimizer"])


class ObservationNovelty:
    """Bonus of each observation of an episode: a `Stateful` component.

    Args:
        episodic: The factor of the episode alone: `elliptical`, see `elliptical_bonuses`, or `count`, see
            `count_bonuses`.
        across: The factor of all steps: `count`, or `rnd`, see `RandomNetwork` and `error_increases`.
        combine: Whether the factors are multiplied or added.
        ridge: The regularisation of `elliptical`.
        share: The share of the error of the observation before, which `rnd` subtracts.
        divide_by_std: Whether to divide by the std of all bonuses of earlier steps; without any, the bonus
            is 0.
        network: The networks of `rnd`.
    """

    name = "novelty"

    def __init__(
        self,
        episodic: Episodic,
        across: Across,
        combine: Combine,
        *,
        ridge: float,
        share: float,
        divide_by_std: bool,
        network: RandomNetwork | None = None,
    ) -> None:
        self.episodic, self.across, self.combine = episodic, across, combine
        self.ridge, self.share, self.divide_by_std = ridge, share, divide_by_std
        self.network = network
        self.counts = VisitCounts(final=True, normalised=True)
        self._moments = torch.zeros(3, dtype=torch.float64)  # count, sum and sum of squares of the bonuses
        self.metrics: Mapping[str, float] = {}

    def bonuses(self, episode: Episode) -> Tensor:
        """Return the bonus of what each turn led to; [turns] float64, 0 for an empty observation."""
        found = self._raw(episode)
        if not self.divide_by_std:
            return found
        count, total, squares = self._moments.tolist()
        variance = squares / count - (total / count) ** 2 if count else 0.0
        return found / variance**0.5 if variance > 1e-12 else torch.zeros_like(found)

    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Learn from the observations of a rollout batch, and keep what to log of it."""
        raw = _by_turn(rollout.batch, self._raw)
        given = _by_turn(rollout.batch, self.bonuses)
        found = {"bonus": float(given.mean()) if len(given) else 0.0}
        self._moments = self._moments + torch.stack([torch.ones_like(raw), raw, raw.square()]).sum(dim=1)
        rows = [text_features(text) for episode in rollout.batch.episodes for text in observations(episode)]
        if self.network is not None and rows:
            features = torch.stack(rows)
            found["rnd_error"] = float(self.network.errors(features).mean())
            self.network.learn(features)
        self.counts.update(rollout, context)
        self.metrics = found | {"states": float(len(self.counts))}

    def state_dict(self) -> dict[str, Any]:
        """Return counts, moments and networks."""
        network = {} if self.network is None else self.network.state_dict()
        return {"kind": self._kind, "counts": self.counts.state_dict(), "moments": self._moments} | network

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore the state.

        Raises:
            CheckpointError: If it is of other factors, whose bonuses have another scale.
        """
        if state["kind"] != self._kind:
            raise CheckpointError(f"{self.name} holds bonuses of {state['kind']}, wanted {self._kind}")
        self.counts.load_state_dict(state["counts"], context)
        self._moments = state["moments"].clone()
        if self.network is not None:
            self.network.load_state_dict(state)

    @property
    def _kind(self) -> str:
        return f"{self.episodic} {self.combine} {self.across}"

    def _raw(self, episode: Episode) -> Tensor:
        """Return the bonuses before the division; [turns] float64."""
        if not episode.turns:
            return torch.zeros(0, dtype=torch.float64)
        keys, texts = self.counts.keys(episode), observations(episode)
        features = torch.stack([text_features(text) for text in texts])
        within, factors = _occurrences(keys), list[Tensor]()
        overall = within + torch.tensor(self.counts.visits(episode))
        first, rare = functional.count_bonuses(within, overall)
        if self.episodic != "none":
            count = self.episodic == "count"
            factors.append(first if count else functional.elliptical_bonuses(features, self.ridge))
        if self.across == "count":
            factors.append(rare)
        elif self.network is not None:
            factors.append(functional.error_increases(self.network.errors(features), self.share))
        joined = torch.stack(factors)
        found = joined.prod(dim=0) if self.combine == "mult" else joined.sum(dim=0)
        # The first observation is no merit of an action.
        return torch.where(torch.tensor([bool(text) for text in texts]), found, 0.0)[1:]


def observations(episode: Episode) -> list[str]:
    """Return the observation of each turn, and the one after the last reply."""
    return [*(turn.observation for turn in episode.turns), episode.final_observation]


def _by_turn(batch: Batch, values: Callable[[Episode], Tensor]) -> Tensor:
    """Return the value of every turn, once for turns that branches share; [N] float64."""
    found = {
        place: value
        for episode, places in zip(batch.episodes, played_turns(batch), strict=True)
        for place, value in zip(places, values(episode).tolist(), strict=True)
    }
    return torch.tensor(list(found.values()), dtype=torch.float64)


def _occurrences(keys: list[str]) -> Tensor:
    """Return how often each key occurs up to its place; [N] int64."""
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        seen[key] += 1
        found.append(seen[key])
    return torch.tensor(found)
