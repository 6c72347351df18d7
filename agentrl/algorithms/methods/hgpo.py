"""HGPO: turns are compared with those of the same state, and the more, the more of their past is shared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import turn_exists, turn_rewards, turns_to_tokens
from agentrl.algorithms.hooks import Advantage, Context, MiniBatch, requires
from agentrl.algorithms.methods.grpo import GRPO, mark_comparing
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch


@recipe("hgpo")
@dataclass(frozen=True)
class HGPO(GRPO):
    """Hierarchy-of-groups policy optimisation: steps compared in groups of the same recent observations.

        A   = sum_k w_k A_k / sum_k w_k,   w_k = (k + offset)^alpha,   k = 0 .. history
        A_k = (G - mean G) / (std G + 1e-6),   over the turns of the group whose last k + 1 observations agree

    G is the discounted return from a turn on and std that of the population. A group of one turn has no A_k
    and is left out of both sums; near the start of an episode there are fewer observations. With `episode`,
    the advantage of `grpo` joins in with the weight (offset - 1)^alpha. With history 0 it is the step part
    of `gigpo`, but for the std.

        field             | paper      | released   | ours
        dual_clip         | null       | 3.0        | null
        aggregation       | sequence   | token      | sequence
        kl_coefficient    | 0.01       | 0.0        | 0.0
        invalid_penalty   | 0.1        | 0.0        | 0.0
        drop_equal_groups | false      | false      | false
        weighting         | trajectory | row        | trajectory
        singleton         | zero       | raw        | zero
        offset            | 1          | 2          | 1

    The released code keeps weight 1 for the episode, which is off by default there, so that its weights are
    those of offset 2. It also leaves out every A_k that is 0, as of a turn whose return is the mean, which
    makes A jump where G moves by nothing; only `released` does so. The published runs have history 2 or 4,
    groups of 8, and divide by the std in ALFWorld, not in WebShop.

    Args:
        history: The number of earlier observations that are compared at most, K.
        alpha: How much more a longer shared past counts.
        offset: 1 as in the paper, 2 as in the released code.
        episode: Whether the advantage of the episode joins in; needs offset 2 or more.
        gamma: The discount from one turn to the next.
        divide_by_std: False is mean_norm, for all levels; True is mean_std_norm.

    The remaining fields are those of `grpo`.

    Source: arXiv:2602.22817.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"kl_coefficient": 0.01, "invalid_penalty": 0.1},
        "released": {"offset": 2},
    }

    drop_equal_groups: bool = False
    history: Annotated[int, Interval(ge=0, le=1000)] = 2
    alpha: Weight = 1.0
    offset: Annotated[int, Interval(ge=1, le=1000)] = 1
    episode: bool = False
    gamma: Share = 0.95

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        levels = [f"history_states:{k}" for k in range(self.history + 1)]
        weights = [float(k + self.offset) ** self.alpha for k in range(self.history + 1)]
        compare = partial(
            hierarchical_advantage,
            levels=dict(zip(levels, weights, strict=True)),
            gamma=self.gamma,
            divide_by_std=self.divide_by_std,
            skip_zeros=self.preset == "released",
            episode=plain.advantage if self.episode else None,
            episode_weight=float(self.offset - 1) ** self.alpha,
        )
        declared = requires(*levels, "branch_weights")
        return replace(
            plain,
            advantage=mark_comparing(declared(compare), self.singleton),
            diagnostics=(*plain.diagnostics, requires(*levels)(partial(level_metrics, levels=levels))),
        )

    def _contradictions(self) -> list[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.episode and self.offset < 2,
                f"offset is {self.offset} and gives the episode no weight, wanted at least 2 with episode",
            ),
        ]


def hierarchical_advantage(
    batch: Batch,
    context: Context,
    *,
    levels: Mapping[str, float],
    gamma: float,
    divide_by_std: bool,
    skip_zeros: bool,
    episode: Advantage | None,
    episode_weight: float,
) -> Tensor:
    """Average the advantages of the levels of a turn, as `HGPO` says; [B, T] float64.

    `levels` are the features that number the contexts, with their weights.
    """
    exists, copies = turn_exists(batch), feature_of(batch, "branch_weights")
    returns = functional.discounted_returns(turn_rewards(batch), exists, gamma=gamma)[exists]
    total, sizes = torch.zeros_like(returns), torch.zeros_like(returns)
    for name, weight in levels.items():
        contexts = feature_of(batch, name)[exists]
        found = functional.group_relative_advantage(
            returns, contexts, divide_by_std=divide_by_std, copies=copies[exists], ddof=0
        )
        counted = (found != 0) if skip_zeros else _shared(contexts, copies[exists])
        total = total + weight * torch.where(counted, found, 0.0)
        sizes = sizes + weight * counted
    table = torch.zeros(exists.shape, dtype=total.dtype, device=total.device)
    if episode is None:
        table[exists] = total / torch.where(sizes > 0, sizes, 1.0)
        return turns_to_tokens(table, batch)
    table[exists] = total
    summed = turns_to_tokens(table, batch) + episode_weight * episode(batch, context)
    table[exists] = sizes + episode_weight
    return summed / torch.where(batch.action_mask, turns_to_tokens(table, batch), 1.0)


def level_metrics(mini: MiniBatch, context: Context, *, levels: list[str]) -> Mapping[str, float]:
    """Measure the share of turns whose context another turn shares, by level: hgpo/shared/K."""
    exists = turn_exists(mini.batch)
    numbers = {}
    for level, name in enumerate(levels):
        contexts = feature_of(mini.batch, name)[exists]
        if len(contexts):
            shared = _shared(contexts, torch.ones(len(contexts), dtype=torch.float64, device=contexts.device))
            numbers[f"hgpo/shared/{level}"] = float(shared.double().mean())
    return numbers


def _shared(contexts: Tensor, copies: Tensor) -> Tensor:
    """Return whether a turn has company in its context, in which copies of one turn count once; [N] bool."""
    _, member = contexts.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    counts = copies.new_zeros(int(member.max()) + 1 if len(member) else 0).index_add(0, member, copies)
    return counts[member] >= 1.5  # 1 up to rounding, if copies are fractions
