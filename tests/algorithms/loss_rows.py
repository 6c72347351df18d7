"""Tokens with given ratios and advantages, and the slope that the objective gives each of them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.learn.objective import Objective, build_objective

DOUBLE = torch.float64
RATIOS = (0.5, 1.0, 1.5)


def rows(
    new: Sequence[Sequence[float]],
    old: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
    sampled: Sequence[Sequence[float]] | None = None,
) -> MiniBatch:
    """Episodes of one turn with these log-probabilities of the policy now, before the update, and sampled.

    Where `sampled` is None, the tokens were sampled with the probabilities before the update.
    """
    episodes = [
        Episode(
            f"e{number}",
            "env",
            "t",
            0,
            (Turn("o", "a", prompt_ids=(1,), action_ids=(2,) * len(tokens), new_sequence=True),),
            StopReason.TERMINATED,
        )
        for number, tokens in enumerate(old)
    ]
    batch = collate([Group("t", tuple(episodes))])

    def at_tokens(values: Sequence[Sequence[float]]) -> Tensor:
        out = torch.zeros(batch.tokens.shape, dtype=DOUBLE)
        out[batch.action_mask] = torch.tensor([value for row in values for value in row], dtype=DOUBLE)
        return out

    batch = replace(
        batch, old_logprobs=at_tokens(old), logprobs=at_tokens(old if sampled is None else sampled)
    )
    current = Outputs(at_tokens(new), torch.zeros(batch.tokens.shape, dtype=DOUBLE))
    return MiniBatch(batch, at_tokens(advantages), current)


def with_ratios(probability: float, ratios: Sequence[float] = RATIOS, *signs: float) -> MiniBatch:
    """One episode whose tokens had `probability`, and now have it times each ratio, for each advantage."""
    signs = signs or (1.0, -1.0)
    moved = torch.tensor(ratios, dtype=DOUBLE).log().tolist() * len(signs)
    old = [float(torch.tensor(probability, dtype=DOUBLE).log())] * len(moved)
    advantages = [sign for sign in signs for _ in ratios]
    return rows([[a + b for a, b in zip(old, moved, strict=True)]], [old], [advantages])


def loss_and_slopes(algorithm: Algorithm, mini: MiniBatch) -> tuple[Objective, float, list[float]]:
    """The objective, its loss, and for each token -d loss / d logprob times the number of tokens."""
    objective = build_objective(mini, algorithm, Context())
    assert mini.current is not None
    logprobs = mini.current.logprobs.clone().requires_grad_()
    outputs = Outputs(logprobs, torch.zeros_like(logprobs))
    loss, _ = objective.contribution(torch.arange(len(logprobs)), outputs)
    (slopes,) = torch.autograd.grad(loss, logprobs)
    mask = mini.batch.action_mask
    return objective, loss.item(), (-slopes[mask] * int(mask.sum())).tolist()
