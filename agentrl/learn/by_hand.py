"""Small inputs to test a method with: a mini-batch of given numbers, and a few updates of a tiny policy."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.recipe import Recipe
from agentrl.algorithms.token_statistics import reads_teacher
from agentrl.data.batch import Batch, Layout, collate
from agentrl.data.trajectory import Episode, Group, StopReason, Turn
from agentrl.learn.forward import Forward
from agentrl.learn.learner import Learner
from agentrl.learn.objective import Objective, build_objective
from agentrl.learn.settings import LearnerConfig
from agentrl.learn.views import Perturb
from agentrl.policy.perturbation import PromptView
from agentrl.seeds import derive_seed

VOCABULARY, WIDTH = 11, 5
Rows = Sequence[Sequence[float]]


def mini_batch(
    *, logprobs: Rows, advantages: Rows, old_logprobs: Rows | None = None, entropies: Rows | None = None
) -> MiniBatch:
    """Return a mini-batch with given numbers: a row for each sequence, a number for each action token.

    Every row is an episode of one turn, after one token of prompt, and all of them are one group.

    Args:
        logprobs: The log-probabilities under the current policy, in nats.
        advantages: The advantages.
        old_logprobs: The log-probabilities before the update; None for a ratio of 1.
        entropies: The entropies under the current policy and before the update, in nats; None for 0.
    """
    episodes = tuple(_episode(str(index), [len(row)]) for index, row in enumerate(logprobs))
    batch = collate([Group("task", episodes)])
    current = _placed(logprobs, batch)
    entropy = torch.zeros_like(current) if entropies is None else _placed(entropies, batch)
    old = current if old_logprobs is None else _placed(old_logprobs, batch)
    batch = replace(batch, logprobs=old, old_logprobs=old, old_entropies=entropy)
    return MiniBatch(batch, _placed(advantages, batch), Outputs(current, entropy))


def objective_of(recipe: Recipe, mini: MiniBatch) -> Objective:
    """Return the objective of a mini-batch: its `mini` (mask, ratio, bounds), `weights` and `factors`."""
    return build_objective(mini, recipe.build(), Context(vocabulary=VOCABULARY))


def loss_of(recipe: Recipe, mini: MiniBatch) -> float:
    """Return the loss of a mini-batch under the current policy."""
    objective, outputs = objective_of(recipe, mini), mini.now
    return float(objective.contribution(torch.arange(len(mini.batch.tokens)), outputs)[0])


def weights_after_an_update(
    recipe: Recipe, *, layout: Layout = "trajectory", micro_batch_tokens: int = 60
) -> Tensor:
    """Return the weights of a tiny policy after an update of several optimiser steps on random episodes.

    A recipe in which something has no effect gives exactly the weights of one without it.
    """
    algorithm, context = recipe.build(), Context(total_steps=4, vocabulary=VOCABULARY)
    config = LearnerConfig(
        optimizer="adamw", warmup_steps=0, mini_batches=2, epochs=2, micro_batch_tokens=micro_batch_tokens
    )
    learner = Learner(
        _TinyPolicy(0),
        config,
        reference=_TinyPolicy(1).requires_grad_(False) if "reference" in algorithm.requires else None,
        teacher=_TinyPolicy(2) if reads_teacher(algorithm.requires) else None,
        critic="values" in algorithm.requires,
        reward_model=None if algorithm.reward_model is None else _TinyPolicy(1),
        forward=Forward(_hidden_states, lambda policy: policy.embedding.weight, _embedding),
        perturb=_perturb,
    )
    learner.update(prepare(algorithm, _groups(), context, layout=layout), algorithm, context)
    return torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


class _TinyPolicy(nn.Module):
    """Policy in double precision; the state of a token is a layer over the mean of the embeddings so far."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        numbers = torch.randn(VOCABULARY + WIDTH, WIDTH, generator=draw, dtype=torch.float64)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, _weight=numbers[:VOCABULARY].clone())
        self.mix = nn.Parameter(numbers[VOCABULARY:].clone())


def _hidden_states(policy: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
    assert isinstance(policy, _TinyPolicy)
    rows = []
    for row in torch.split(tokens, lengths.tolist()):
        steps = torch.arange(1, len(row) + 1, dtype=torch.float64)[:, None]
        rows.append(torch.tanh(policy.embedding(row).cumsum(0) / steps @ policy.mix))
    return torch.cat(rows)


def _embedding(policy: nn.Module) -> nn.Module:
    assert isinstance(policy, _TinyPolicy)
    return policy.embedding


def _perturb(perturbation: str, amount: float, seed: int) -> Perturb:
    """Return a change of observations without text: noise on each prompt, whatever is asked for."""

    def changed(episode: Episode, index: int) -> PromptView:
        prompt = episode.turns[index].prompt_ids
        return PromptView(prompt, tuple(range(len(prompt))), derive_seed(seed, episode.id, index))

    return changed


def _groups() -> list[Group]:
    """Return three groups of four episodes of one to three turns, of which every other one succeeds."""
    draw = random.Random(0)
    return [
        Group(
            f"task {number}",
            tuple(
                _episode(
                    f"{number}-{member}",
                    [draw.randint(2, 4) for _ in range(draw.randint(1, 3))],
                    success=bool(member % 2),
                    draw=draw,
                )
                for member in range(4)
            ),
        )
        for number in range(3)
    ]


def _episode(
    name: str, lengths: Sequence[int], *, success: bool = False, draw: random.Random | None = None
) -> Episode:
    draw = draw or random.Random(name)
    turns = tuple(
        Turn(
            observation=draw.choice("abc"),
            action=draw.choice("xy"),
            prompt_ids=(draw.randrange(VOCABULARY),),
            action_ids=tuple(draw.randrange(VOCABULARY) for _ in range(length)),
            logprobs=tuple(-draw.random() for _ in range(length)),
            entropies=tuple(draw.random() for _ in range(length)),
            reward=float(success and index == len(lengths) - 1),
            new_sequence=index == 0,
        )
        for index, length in enumerate(lengths)
    )
    return Episode(name, "env", "task", 0, turns, StopReason.TERMINATED, success=success)


def _placed(rows: Rows, batch: Batch) -> Tensor:
    """Return numbers at the action tokens of a batch; [B, T] float64."""
    values = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    values[batch.action_mask] = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return values
