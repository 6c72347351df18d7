"""From rows of a batch to what the policy says about their tokens. The only place where positions shift."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms.hooks import Outputs
from agentrl.data.batch import Batch
from agentrl.learn.fused import token_statistics
from agentrl.policy import model

HiddenStates = Callable[[Any, Tensor, Tensor], Tensor]
OutputWeight = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Forward:
    """How to read a policy.

    Args:
        hidden_states: (policy, tokens [N], lengths [B]) -> [N, d]: rows one behind the other, none seeing
            another.
        output_weight: policy -> [V, d].
        temperature: that of sampling: what is improved is the distribution that replies are drawn from.
    """

    hidden_states: HiddenStates = model.hidden_states
    output_weight: OutputWeight = model.output_weight
    temperature: float = 1.0

    def describe(self, policy: nn.Module, batch: Batch, value_head: nn.Module | None = None) -> Outputs:
        """Logprob and entropy of every sampled token, and its value with a value head; [B, T], 0 elsewhere.

        The state at position t - 1 predicts token t. Only states that predict a decision meet the output
        embedding, and what follows a row's last decision is not computed at all.
        """
        lengths = needed_lengths(batch)
        rows, positions = batch.sampled.nonzero(as_tuple=True)
        if not len(rows):
            nothing = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
            return Outputs(nothing, nothing, None if value_head is None else nothing)
        width = batch.tokens.shape[1]
        kept = torch.arange(width, device=lengths.device) < lengths[:, None]
        hidden = self.hidden_states(policy, batch.tokens[kept], lengths[lengths > 0])
        starts = lengths.cumsum(0) - lengths
        states = hidden.index_select(0, starts[rows] + positions - 1)
        found = [
            *_statistics(
                states,
                self.output_weight(policy),
                batch.tokens[rows, positions],
                _choices(batch, rows, positions),
                self.temperature,
            )
        ]
        if value_head is not None:
            found.append(value_head(states).squeeze(-1).to(found[0].dtype))
        return Outputs(*(_scatter(values, rows, positions, batch.tokens.shape) for values in found))

    def last_values(self, policy: nn.Module, batch: Batch, value_head: nn.Module) -> Tensor:
        """What a value head says after the last token of every row; [B]."""
        kept = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]
        hidden = self.hidden_states(policy, batch.tokens[kept], batch.lengths)
        values: Tensor = value_head(hidden.index_select(0, batch.lengths.cumsum(0) - 1))
        return values.squeeze(-1)


def in_bfloat16(hidden_states: HiddenStates) -> HiddenStates:
    """Have a policy's layers computed in bfloat16, over weights that stay as they are (autocast).

    Products and attention are rounded; sums along the layers, norms, and all that is made of the states that
    come out, which are float32, are not.
    """

    def rounded(policy: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            hidden = hidden_states(policy, tokens, lengths)
        return hidden.float()

    return rounded


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    choices: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Logprob and entropy of each decision, those with a choice of ids apart from those without."""
    if choices is None:
        return token_statistics(hidden, weight, targets, temperature=temperature)
    order, ids = choices
    parts = [token_statistics(hidden[order], weight, targets[order], ids, temperature)]
    if len(order) < len(hidden):
        free = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        free[order] = False
        others = free.nonzero().squeeze(1)
        parts.append(token_statistics(hidden[others], weight, targets[others], temperature=temperature))
        order = torch.cat([order, others])
    back = order.argsort()
    logprobs, entropies = (torch.cat(values)[back] for values in zip(*parts, strict=True))
    return logprobs, entropies


def needed_lengths(batch: Batch) -> Tensor:
    """[B] int64, tokens of each row that come before its last decision: those that a forward pass needs."""
    if not batch.tokens.numel():
        return torch.zeros_like(batch.lengths)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return torch.where(batch.sampled, positions, 0).amax(dim=1)


def _choices(batch: Batch, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which of the listed decisions were constrained ([M] places in the list), and to what ([M, K] ids)."""
    if batch.allowed is None:
        return None
    place = torch.zeros(batch.tokens.shape, dtype=torch.int64, device=rows.device)
    place[rows, positions] = torch.arange(len(rows), device=rows.device)
    return place[batch.allowed.rows, batch.allowed.positions], batch.allowed.ids


def _scatter(values: Tensor, rows: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    return values.new_zeros(shape).index_put((rows, positions), values)
