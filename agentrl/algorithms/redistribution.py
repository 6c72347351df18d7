"""A model of the rewards of turns, fitted to the returns of episodes: a `Stateful` component."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agentrl.algorithms import functional
from agentrl.algorithms.features import turn_table
from agentrl.algorithms.hooks import Advantage, Context, MiniBatch
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode
from agentrl.env.factors import Factor, PlayedTurn, factor_values, factors_of
from agentrl.errors import CheckpointError
from agentrl.seeds import derive_seed

Decomposition = Literal["rd", "rrd", "rrd_unbiased"]


class TurnRewards:
    """Multi-layer perceptrons from the factors of a turn to its reward, one for each environment.

    They are computed in float64 on the CPU, so that every rank has the same ones.

    Args:
        name: The key of the state.
        loss: The loss: of all turns (`rd`), of `sample` turns drawn from each episode (`rrd`), or that
            without its bias; see `redistribution_loss`.
        sample: The number of turns that are drawn.
        layers: The number of hidden layers.
        width: Their width.
        learning_rate: The learning rate of Adam.
        updates: The steps of Adam per training step, on all of its episodes.
        warmup: The training steps in which the rewards stay what they are.
    """

    def __init__(
        self,
        name: str,
        *,
        loss: Decomposition,
        sample: int,
        layers: int,
        width: int,
        learning_rate: float,
        updates: int,
        warmup: int,
    ) -> None:
        self.name = name
        self._loss, self._sample, self._shape = loss, sample, (layers, width)
        self._rate, self._updates, self._warmup = learning_rate, updates, warmup
        self._models: dict[str, _Model] = {}
        self._losses: list[float] = []  # of the last update

    def read(self, batch: Batch, context: Context, *, hook: Advantage) -> Tensor:
        """Return what a hook makes of the batch with the rewards of the model in place of its own."""
        return hook(self.redistributed(batch, context), context)

    def redistributed(self, batch: Batch, context: Context) -> Batch:
        """Return the batch with the rewards of the model, or as it is during the warm-up."""
        if context.step < self._warmup:
            return batch
        with torch.no_grad():
            found = [
                self._model(episode.env, context).rewards(episode).tolist() for episode in batch.episodes
            ]
        return batch.with_rewards(turn_table(batch, found))

    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Fit the models to the returns of the episodes."""
        batch, self._losses = rollout.batch, []
        returns = dict(enumerate(batch.returns.tolist()))
        for env in sorted({episode.env for episode in batch.episodes}):
            chosen = [
                index for index, each in enumerate(batch.episodes) if each.env == env and len(each.turns)
            ]
            if not chosen:
                continue
            model = self._model(env, context)
            inputs = [model.inputs(batch.episodes[index]) for index in chosen]
            wanted = torch.tensor([returns[index] for index in chosen], dtype=torch.float64)
            seed = derive_seed(context.seed, self.name, env, context.step)
            generator = torch.Generator().manual_seed(seed)
            losses = [self._fit(model, inputs, wanted, generator) for _ in range(self._updates)]
            self._losses.append(losses[0])

    def _fit(
        self, model: "_Model", inputs: Sequence[Tensor], returns: Tensor, generator: torch.Generator
    ) -> float:
        """Take a step of Adam; return the loss before it."""
        picks = [self._pick(len(each), generator) for each in inputs]
        width = max(map(len, picks))
        drawn = torch.tensor([[place < len(pick) for place in range(width)] for pick in picks])
        rows = torch.cat([each[pick] for each, pick in zip(inputs, picks, strict=True)])
        with torch.enable_grad():
            rewards = torch.zeros(drawn.shape, dtype=torch.float64).masked_scatter(drawn, model.network(rows))
            loss = functional.redistribution_loss(
                rewards,
                drawn,
                returns,
                torch.tensor([len(each) for each in inputs]),
                unbiased=self._loss == "rrd_unbiased",
            ).mean()
            model.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        model.optimizer.step()
        return float(loss.detach())

    def _pick(self, turns: int, generator: torch.Generator) -> Tensor:
        """Return the turns that the loss is computed from."""
        if self._loss == "rd":
            return torch.arange(turns)
        if self._sample > turns:
            return torch.randint(turns, (self._sample,), generator=generator)
        return torch.randperm(turns, generator=generator)[: self._sample]

    def _model(self, env: str, context: Context) -> "_Model":
        if env not in self._models:
            # Its first weights depend on the seed of the run alone, so it does not matter who asks first.
            seed = derive_seed(context.seed, self.name, env)
            self._models[env] = _Model(env, *self._shape, self._rate, seed)
        return self._models[env]

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the loss before the update, and the mean and largest size of a turn's reward after it."""
        with torch.no_grad():
            found = [self._model(each.env, context).rewards(each) for each in rollout.batch.episodes]
        rewards = torch.cat(found) if found else torch.zeros(0)
        if not len(rewards) or not self._losses:
            return {}
        return {
            f"{self.name}/loss": sum(self._losses) / len(self._losses),
            f"{self.name}/reward_mean": float(rewards.mean()),
            f"{self.name}/reward_max": float(rewards.abs().max()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the optimiser of each model, with the names of its factors."""
        # Copies, since later updates change the tensors in place.
        return {
            env: {
                "factors": list(model.factors),
                "weights": deepcopy(model.network.state_dict()),
                "optimizer": deepcopy(model.optimizer.state_dict()),
            }
            for env, model in self._models.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore them; the environments must have the same factors."""
        self._models = {}
        for env, stored in state.items():
            model = self._model(env, context)
            if list(stored["factors"]) != list(model.factors):
                raise CheckpointError(
                    f"the state of {self.name} is of the factors {', '.join(stored['factors'])} of {env}, "
                    f"which now has {', '.join(model.factors)}; resume with the factors of the run"
                )
            try:
                model.network.load_state_dict(stored["weights"])
                model.optimizer.load_state_dict(stored["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"the state of {self.name} does not fit its model ({error})") from error


class _Model:
    """Model of one environment, and its optimiser."""

    def __init__(self, env: str, layers: int, width: int, learning_rate: float, seed: int) -> None:
        self.factors: dict[str, Factor] = factors_of(env)
        sizes = [len(self.factors), *[width] * layers]
        parts: list[nn.Module] = []
        generator = torch.Generator().manual_seed(seed)
        for inner, outer in zip(sizes, [*sizes[1:], 1], strict=True):
            layer = nn.Linear(inner, outer, dtype=torch.float64)
            for values in layer.parameters():
                nn.init.uniform_(values, -(inner**-0.5), inner**-0.5, generator=generator)
            parts += [layer, nn.ReLU()]
        self.network = nn.Sequential(*parts[:-1])
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)

    def inputs(self, episode: Episode) -> Tensor:
        """Return the factors of each turn; [K, F] float64."""
        values = [factor_values(self.factors, turn) for turn in played_turns(episode)]
        return torch.tensor(values, dtype=torch.float64).reshape(len(values), len(self.factors))

    def rewards(self, episode: Episode) -> Tensor:
        """Return the reward of each turn; [K] float64."""
        found: Tensor = self.network(self.inputs(episode))
        return found.squeeze(1)


def played_turns(episode: Episode) -> list[PlayedTurn]:
    """Return the turns of an episode as texts, each with those before it and the answer to it."""
    turns = episode.turns
    told = [(turn.observation, turn.action) for turn in turns]
    answers = [*(turn.observation for turn in turns[1:]), episode.final_observation]
    offered = [*(turn.info.get("choices") for turn in turns), None]
    return [
        PlayedTurn(
            opening=told[0][0],
            earlier=tuple(told[:index]),
            observation=turn.observation,
            action=turn.action,
            answer=answers[index],
            valid=turn.valid,
            choices=offered[index],
            choices_after=offered[index + 1],
        )
        for index, turn in enumerate(turns)
    ]
