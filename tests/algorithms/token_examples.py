"""Batches whose tokens have given numbers, for the published examples of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agentrl.algorithms.hooks import MiniBatch, Outputs
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.learn.objective import Objective

DOUBLE = torch.float64
PROMPT = 0  # the token before each turn; the sampled ones are 1, 2, ... in order

Numbers = Sequence[float] | Tensor


def played(
    lengths: Sequence[Sequence[int]],
    returns: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    answers: Sequence[str] | None = None,
) -> list[Group]:
    """Episodes with turns of these many tokens; an answer is the text of the last turn."""
    members: dict[int, list[Episode]] = {}
    first = 1
    for number, turns in enumerate(lengths):
        made = []
        for index, length in enumerate(turns):
            last = index == len(turns) - 1
            made.append(
                Turn(
                    "o",
                    answers[number] if last and answers is not None else "a",
                    prompt_ids=(PROMPT,),
                    action_ids=tuple(range(first, first + length)),
                    logprobs=(-1.0,) * length,
                    entropies=(1.0,) * length,
                    reward=returns[number] if last and returns is not None else 0.0,
                    new_sequence=index == 0,
                )
            )
            first += length
        group = 0 if groups is None else groups[number]
        episode = Episode(f"e{number}", "env", f"t{group}", 0, tuple(made), StopReason.TERMINATED)
        members.setdefault(group, []).append(episode)
    return [Group(f"t{group}", tuple(episodes)) for group, episodes in members.items()]


def at_tokens(batch: Batch, values: Numbers) -> Tensor:
    """The number of each sampled token, in the order of `played`; 0 elsewhere; [B, T, ...]."""
    table = torch.as_tensor(values, dtype=DOUBLE)
    table = torch.cat([torch.zeros_like(table[:1]), table])
    found = table[batch.tokens.clamp(max=len(table) - 1)]
    mask = batch.action_mask.view(*batch.action_mask.shape, *[1] * (found.dim() - 2))
    return torch.where(mask, found, torch.zeros_like(found))


def scored(
    groups: Sequence[Group],
    *,
    logprobs: Numbers | None = None,
    entropies: Numbers | None = None,
    reference: Numbers | None = None,
    teacher: Numbers | None = None,
    extras: Mapping[str, Numbers] | None = None,
    layout: Any = "trajectory",
) -> Batch:
    """A batch with what the scoring pass says of each token."""
    batch = collate(groups, layout=layout)
    said = {
        "old_logprobs": logprobs,
        "old_entropies": entropies,
        "reference_logprobs": reference,
        "teacher_logprobs": teacher,
    }
    found: dict[str, Any] = {
        name: at_tokens(batch, values) for name, values in said.items() if values is not None
    }
    return replace(
        batch,
        logprobs=batch.logprobs.double(),
        extras={name: at_tokens(batch, values) for name, values in (extras or {}).items()},
        **found,
    )


def mini_batch(
    batch: Batch,
    advantages: Numbers | float,
    *,
    logprobs: Numbers | None = None,
    entropies: Numbers | None = None,
    extras: Mapping[str, Numbers] | None = None,
) -> MiniBatch:
    """A mini-batch of all rows with what the current policy says; the old log-probabilities by default."""
    zeros = torch.zeros(batch.tokens.shape, dtype=DOUBLE)
    new = batch.old_logprobs if logprobs is None else at_tokens(batch, logprobs)
    current = Outputs(
        zeros if new is None else new,
        zeros if entropies is None else at_tokens(batch, entropies),
        extras={name: at_tokens(batch, values) for name, values in (extras or {}).items()},
    )
    given = (
        torch.where(batch.action_mask, torch.tensor(advantages, dtype=DOUBLE), 0.0)
        if isinstance(advantages, float)
        else at_tokens(batch, advantages)
    )
    return MiniBatch(batch, given, current)


def in_order(batch: Batch, values: Tensor) -> list[Any]:
    """The numbers of the sampled tokens, in the order of `played`."""
    mask = batch.action_mask
    found = dict(zip(batch.tokens[mask].tolist(), values[mask].tolist(), strict=True))
    return [found[token] for token in sorted(found)]


def loss_of(objective: Objective) -> tuple[dict[str, float], Outputs]:
    """The numbers of a mini-batch by the current policy, and the outputs, which have the gradient."""
    assert objective.mini.current is not None
    now = objective.mini.current

    def leaf(values: Tensor) -> Tensor:
        return values.detach().clone().requires_grad_()

    extras = {name: leaf(each) for name, each in now.extras.items()}
    outputs = Outputs(leaf(now.logprobs), leaf(now.entropies), extras=extras)
    loss, numbers = objective.contribution(torch.arange(len(now.logprobs)), outputs)
    torch.autograd.backward(loss)
    return {name: float(value) for name, value in numbers.items()}, outputs
