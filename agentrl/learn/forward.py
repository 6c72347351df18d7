"""Forward pass of a policy over rows of a batch. The only place where positions are shifted by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms.hooks import Outputs
from agentrl.algorithms.observation_view import OBSERVATION_KL
from agentrl.algorithms.token_statistics import NOTHING, Statistics, empty_extras
from agentrl.data.batch import Batch
from agentrl.errors import RequirementError
from agentrl.learn.divergence import state_divergence
from agentrl.learn.fused import OfLogits, Temperature, paired_statistics, token_statistics
from agentrl.learn.views import ViewRows
from agentrl.policy import model

HiddenStates = Callable[[Any, Tensor, Tensor], Tensor]
OutputWeight = Callable[[Any], Tensor]
Embedding = Callable[[Any], nn.Module]
Choices = tuple[Tensor, Tensor]  # indices of constrained tokens [M], and their allowed ids [M, K]
Shown = tuple[Tensor, Tensor]  # states [N, d] and output embedding [V, d]


@dataclass(frozen=True)
class Forward:
    """Forward pass of a policy, from its hidden states and its output embedding.

    Args:
        hidden_states: The function (policy, tokens [N], lengths [B]) -> [N, d]. The rows are concatenated,
            and none attends to another.
        output_weight: The function policy -> [V, d].
        embedding: The function policy -> the module that embeds tokens, for noise on what it returns.
    """

    hidden_states: HiddenStates = model.hidden_states
    output_weight: OutputWeight = model.output_weight
    embedding: Embedding = model.embedding

    def score(
        self,
        policy: nn.Module,
        batch: Batch,
        value_head: nn.Module | None = None,
        statistics: Statistics = NOTHING,
        view: ViewRows | None = None,
        teacher: Shown | None = None,
    ) -> Outputs:
        """Return log-probability, entropy and, with a value head, value of action tokens; 0 elsewhere.

        The state at position t - 1 predicts token t, at the temperature at which the token was sampled, so
        that the policy that is trained is the one that acted. Logits are computed only for states that
        predict an action token, and nothing is computed after the last action token of a row. Of
        `statistics`, those of logits are computed, and with what the `teacher` shows, those that compare.
        With a view, the extras hold `observation_kl`, 0 in rows that it leaves out, without gradient.
        """
        rows, positions = batch.action_mask.nonzero(as_tuple=True)
        if not len(rows):
            zeros = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
            values = None if value_head is None else zeros
            extras = empty_extras(statistics, zeros)
            return Outputs(zeros, zeros, values, extras=extras | ({OBSERVATION_KL: zeros} if view else {}))
        states, weight = self._states(policy, batch, rows, positions), self.output_weight(policy)
        choices, temperature = _choices(batch, rows, positions), _temperature(batch, rows, positions)
        logprobs, entropies, *further = (
            _scatter(values, rows, positions, batch.tokens.shape)
            for values in (
                *_statistics(
                    states,
                    weight,
                    batch.tokens[rows, positions],
                    choices,
                    temperature,
                    tuple(statistics.of_logits.values()),
                ),
                *_comparisons(states, weight, teacher, choices, temperature, statistics),
            )
        )
        extras = dict(zip(statistics.of_pass, further, strict=True))
        if view is not None:
            extras[OBSERVATION_KL] = self._divergence(policy, batch, view, states).to(logprobs.dtype)
        if value_head is None:
            return Outputs(logprobs, entropies, extras=extras)
        values = value_head(states).squeeze(-1).to(logprobs.dtype)
        values = _scatter(values, rows, positions, batch.tokens.shape)
        return Outputs(logprobs, entropies, values, extras=extras)

    def _divergence(self, policy: nn.Module, batch: Batch, view: ViewRows, states: Tensor) -> Tensor:
        """Return the divergence between batch and view at the action tokens; [B, T], no gradient.

        Args:
            policy: The policy.
            batch: The rows.
            view: The same rows with changed observations.
            states: The states that predict the batch's action tokens, in order.
        """
        rows, positions = batch.action_mask.nonzero(as_tuple=True)
        present = (view.lengths > 0)[rows]
        found = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        if not bool(present.any()):
            return found
        with torch.no_grad(), view.noisy(self.embedding(policy)):
            hidden = self.hidden_states(policy, view.tokens[view.kept()], view.lengths[view.lengths > 0])
        starts = view.lengths.cumsum(0) - view.lengths
        view_rows, places = view.action_mask.nonzero(as_tuple=True)
        others = hidden.index_select(0, starts[view_rows] + places - 1)
        rows, positions = rows[present], positions[present]
        with torch.no_grad():
            values = _divergences(
                states.detach()[present],
                others,
                self.output_weight(policy),
                batch.tokens[rows, positions],
                _choices(batch, *batch.action_mask.nonzero(as_tuple=True)),
                present,
                _temperature(batch, rows, positions),
                view.taken,
            )
        return found.to(values.dtype).index_put((rows, positions), values)

    def show(self, policy: nn.Module, batch: Batch) -> Shown:
        """Return the states [N, d] that predict the action tokens, and the output embedding [V, d]."""
        rows, positions = batch.action_mask.nonzero(as_tuple=True)
        weight = self.output_weight(policy)
        if not len(rows):
            return weight.new_zeros(0, weight.shape[1]), weight
        return self._states(policy, batch, rows, positions), weight

    def _states(self, policy: nn.Module, batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
        lengths = needed_lengths(batch)
        kept = torch.arange(batch.tokens.shape[1], device=lengths.device) < lengths[:, None]
        hidden = self.hidden_states(policy, batch.tokens[kept], lengths[lengths > 0])
        # Rows are concatenated without padding, so row r begins at starts[r].
        starts = lengths.cumsum(0) - lengths
        return hidden.index_select(0, starts[rows] + positions - 1)

    def last_values(self, policy: nn.Module, batch: Batch, value_head: nn.Module) -> Tensor:
        """Return the output of the value head after the last token of each row; [B]."""
        kept = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]
        hidden = self.hidden_states(policy, batch.tokens[kept], batch.lengths)
        values: Tensor = value_head(hidden.index_select(0, batch.lengths.cumsum(0) - 1))
        return values.squeeze(-1)


def in_bfloat16(hidden_states: HiddenStates) -> HiddenStates:
    """Compute a policy's layers in bfloat16 by autocast; the dtype of the weights stays the same.

    Matrix products and attention are rounded. The residual stream, norms and everything computed from the
    final states are float32.
    """

    def autocast(policy: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            hidden = hidden_states(policy, tokens, lengths)
        return hidden.float()

    return autocast


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    choices: Choices | None,
    temperature: Temperature,
    extras: Sequence[OfLogits],
) -> tuple[Tensor, ...]:
    """Return the statistics of each action token, handling constrained tokens separately."""

    def compute(chosen: Tensor | slice, ids: Tensor | None) -> tuple[Tensor, ...]:
        tempered = _of_tokens(temperature, chosen)
        return token_statistics(hidden[chosen], weight, targets[chosen], ids, tempered, extras=extras)

    return _by_constraint(len(hidden), choices, compute)


def _comparisons(
    hidden: Tensor,
    weight: Tensor,
    teacher: Shown | None,
    choices: Choices | None,
    temperature: Temperature,
    statistics: Statistics,
) -> tuple[Tensor, ...]:
    """Return the statistics that compare each action token's distribution with the teacher's."""
    functions = tuple(statistics.of_teacher.values())
    if not functions:
        return ()
    if teacher is None:
        raise RequirementError(f"{', '.join(statistics.of_teacher)}: the learner was given no teacher")
    states, matrix = teacher

    def compute(chosen: Tensor | slice, ids: Tensor | None) -> tuple[Tensor, ...]:
        tempered = _of_tokens(temperature, chosen)
        return paired_statistics(hidden[chosen], weight, (states[chosen], matrix), functions, ids, tempered)

    return _by_constraint(len(hidden), choices, compute)


def _of_tokens(temperature: Temperature, chosen: Tensor | slice) -> Temperature:
    return temperature[chosen] if isinstance(temperature, Tensor) else temperature


def _by_constraint(
    count: int,
    choices: Choices | None,
    compute: Callable[[Tensor | slice, Tensor | None], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Compute numbers of the constrained tokens and of the others, and return them in the given order.

    Args:
        count: The number of tokens.
        choices: The indices of the constrained tokens and their allowed ids; None if there are none.
        compute: (indices [M] or all, allowed ids [M, K] or None) -> numbers [M, ...].
    """
    if choices is None:
        return compute(slice(None), None)
    constrained, ids = choices
    parts, order = [compute(constrained, ids)], constrained
    if len(constrained) < count:
        free = torch.ones(count, dtype=torch.bool, device=ids.device)
        free[constrained] = False
        others = free.nonzero().squeeze(1)
        parts.append(compute(others, None))
        order = torch.cat([constrained, others])
    back = order.argsort()  # to the order of the given tokens
    return tuple(torch.cat(values)[back] for values in zip(*parts, strict=True))


def _divergences(
    hidden: Tensor,
    others: Tensor,
    weight: Tensor,
    targets: Tensor,
    choices: tuple[Tensor, Tensor] | None,
    present: Tensor,
    temperature: Temperature,
    taken: bool,
) -> Tensor:
    """Return the divergence of each action token that is present, over its allowed ids if it has any.

    `choices` counts all action tokens, and `present` marks those that the other tensors hold.
    """
    constrained = torch.zeros(0, dtype=torch.int64, device=hidden.device)
    ids = constrained[:, None]
    if choices is not None:
        place = present.cumsum(0) - 1
        kept = present[choices[0]]
        constrained, ids = place[choices[0][kept]], choices[1][kept]
    free = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    free[constrained] = False
    found = torch.zeros(len(hidden), dtype=weight.dtype, device=hidden.device)
    for chosen, allowed in ((free.nonzero().squeeze(1), None), (constrained, ids)):
        if len(chosen):
            tempered = temperature[chosen] if isinstance(temperature, Tensor) else temperature
            values = state_divergence(
                hidden[chosen], others[chosen], weight, targets[chosen], allowed, tempered, taken=taken
            )
            found = found.to(values.dtype).index_put((chosen,), values)
    return found


def needed_lengths(batch: Batch) -> Tensor:
    """Return how many tokens of each row come before its last action token; [B] int64."""
    if not batch.tokens.numel():
        return torch.zeros_like(batch.lengths)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return torch.where(batch.action_mask, positions, 0).amax(dim=1)


def _temperature(batch: Batch, rows: Tensor, positions: Tensor) -> Temperature:
    """Return the temperature of the action tokens in the list: a number if all have the same, else [N]."""
    if batch.temperatures is None:
        return 1.0
    found = batch.temperatures[rows, positions]
    return float(found[0]) if bool((found == found[0]).all()) else found


def _choices(batch: Batch, rows: Tensor, positions: Tensor) -> Choices | None:
    """Return the indices of constrained action tokens in the list, [M], and their allowed ids, [M, K]."""
    if batch.allowed is None:
        return None
    index = torch.zeros(batch.tokens.shape, dtype=torch.int64, device=rows.device)
    index[rows, positions] = torch.arange(len(rows), device=rows.device)
    return index[batch.allowed.rows, batch.allowed.positions], batch.allowed.ids


def _scatter(values: Tensor, rows: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    return values.new_zeros((*shape, *values.shape[1:])).index_put((rows, positions), values)
