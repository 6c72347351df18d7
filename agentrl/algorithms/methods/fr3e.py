"""FR3E: go back to the most uncertain points of a first rollout, and explore from there."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import EQUAL_RETURNS, Algorithm, mismatch_metrics
from agentrl.algorithms.branching import AnchorUnit, RolloutPlan, Uncertainty, anchor_points, point_scores
from agentrl.algorithms.features import branch_states, tokens_after_branching
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.algorithms.methods.grpo import fixed_clip
from agentrl.algorithms.recipe import Presets, Recipe, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Episode, Group, Turn
from agentrl.seeds import derive_seed

Modulate = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, bases, differ [S] -> [S]


@recipe("fr3e")
@dataclass(frozen=True)
class FR3E(Recipe):
    """First return, entropy-eliciting explore: continuations from the most uncertain points of a rollout.

        V_j = mean return of the continuations from state j
        A   = (R - V_j) * exp(-(V_j - V_{j-1})),   for a continuation from state j

    A task is played once, from the first observation to the end: this episode is the base. Its states are the
    first observation and the K points before its most uncertain action tokens. M continuations are played
    from each state, and their mean return is the state's value. V_{j-1} is the value of the previous state on
    the same base. Only the continuations are learned from, without the part that they share with the base,
    and only in states whose continuations have different returns. The factor is meant for returns within [0,
    1]: a fall of 5 multiplies by 148. If a base has fewer points than K, or was aborted, more continuations
    start at the first observation.

    With several bases, one that succeeded and one that failed are explored, drawn with the seed.

    The preset `released` follows the released code:
    - anchors are the sampled tokens with the lowest probability;
    - the first state's advantages are multiplied by exp(-(1 - V_0)), which shrinks them;
    - changes of value d are sharpened to sign(d) |d|^1.5 / sum |d|^1.5 over the states of a base;
    - the previous state is the previous one of those that are learned from.

    The released code mixes up states after reordering by length; this is not reproduced.

        field         | paper   | released  | ours
        bases         | 1       | 4         | 1
        anchors       | 2       | 4         | 2
        continuations | 4       | 16        | 4
        score         | entropy | surprisal | entropy
        clip_low      | 0.22    | 0.2       | 0.2
        clip_high     | 0.28    | 0.3       | 0.28
        sharpen       | false   | true      | false
        alpha_root    | one     | released  | one

    The paper's numbers of bases, anchors and continuations are not known to us; the values are ours. Its
    temperature is 1.

    Args:
        bases: The number of base episodes of a task.
        anchors: K, the number of points of a base besides its start.
        continuations: M, the number of continuations per state. A task has bases + min(bases, 2) * (K + 1) *
            M episodes. If only one of two wanted bases can be explored, it gets the continuations of both.
        anchor: `token` for points before tokens, `turn` for points before turns; `auto` takes turns if the
            base has more than one.
        score: The uncertainty of a point: `entropy`, the `surprisal` of the sampled token, or `quantile`, the
            highest entropies of the upper quarter, more than three points apart. A turn's score is the mean
            over its action tokens.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        divide_by_std: Whether to divide centred returns by their standard deviation within the state.
        sharpen: Whether to sharpen changes of value, as above.
        alpha_root: The factor of the first state: `one`, or exp(-(1 - V_0)) as `released`.
        parity: `official` follows the preset `released`, but of the table it sets only score, sharpen and
            alpha_root; `paper` has no effect.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {"clip_low": 0.22},
        "released": {
            "bases": 4,
            "anchors": 4,
            "continuations": 16,
            "score": "surprisal",
            "clip_high": 0.3,
            "sharpen": True,
            "alpha_root": "released",
        },
    }
    OFFICIAL: ClassVar[Collection[str]] = ("sharpen", "alpha_root")

    bases: Annotated[int, Interval(ge=1, le=10_000)] = 1
    anchors: Annotated[int, Interval(ge=0, le=10_000)] = 2
    continuations: Annotated[int, Interval(ge=2, le=10_000)] = 4
    anchor: AnchorUnit = "auto"
    score: Uncertainty = "entropy"
    clip_low: Share = 0.2
    clip_high: Weight = 0.28
    divide_by_std: bool = False
    sharpen: bool = False
    alpha_root: Literal["one", "released"] = "one"
    parity: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parity == "official":
            object.__setattr__(self, "score", "surprisal")

    def build(self) -> Algorithm:
        """Build the algorithm."""
        episodes = self.bases + min(self.bases, 2) * (self.anchors + 1) * self.continuations
        modulate = partial(
            state_modulation,
            first=self.alpha_root,
            sharpen=self.sharpen,
            skip_equal=self.preset == "released",
        )
        return Algorithm(
            select=drop_uninformative,
            rollout=RolloutPlan(episodes=episodes, branch_policy=partial(Exploration, self)),
            advantage=partial(exploration_advantage, modulate=modulate, divide_by_std=self.divide_by_std),
            masks=(informative_tokens,),
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=None),
            aggregation=functional.token_weights,
            diagnostics=(mismatch_metrics, partial(exploration_metrics, modulate=modulate, unit=self.anchor)),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.parity == "official" and self.score == "quantile",
                "score is 'quantile', but parity=official chooses anchors by surprisal",
            ),
        ]


@requires("rollout:entropy")
@dataclass
class Exploration:
    """Rollouts of one task, as `FR3E` describes; a `BranchPolicy`.

    Args:
        settings: The recipe.
        budget: The number of episodes of the task.
        seed: The seed of the draw among bases.
        context: Not read.
    """

    settings: FR3E
    budget: int
    seed: int
    context: Context
    _bases: list[Episode] = field(default_factory=list, init=False)

    def begin(self) -> Sequence[BranchPoint | None]:
        """Start the bases."""
        return [None] * self.settings.bases

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """Start nothing: continuations start only after the bases have ended."""
        return ()

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """Start the continuations when the last base has ended."""
        if len(self._bases) == self.settings.bases:
            return ()
        self._bases.append(episode)
        return self._continuations() if len(self._bases) == self.settings.bases else ()

    def _continuations(self) -> Sequence[BranchPoint]:
        explored = explored_bases(self._bases, self.seed)
        # An aborted base has no points to go back to, but it starts at the first observation of the task.
        first = BranchPoint((explored or self._bases)[0].id, 0)
        slots = self.budget - len(self._bases)
        each = slots // (max(len(explored), 1) * (self.settings.anchors + 1))
        states = [
            point
            for base in explored
            for point in (
                BranchPoint(base.id, 0),
                *anchor_points(
                    base, self.settings.anchors, unit=self.settings.anchor, score=self.settings.score
                ),
            )
        ]
        return [first] * (slots - each * len(states)) + [point for point in states for _ in range(each)]


def explored_bases(bases: Sequence[Episode], seed: int) -> list[Episode]:
    """Draw at most one finished base that succeeded and one that failed."""
    finished = sorted((base for base in bases if not base.stop.aborted), key=lambda base: base.id)
    kinds = ([base for base in finished if base.success is success] for success in (True, False))
    return [kind[derive_seed(seed, "base", kind[0].success) % len(kind)] for kind in kinds if kind]


def state_values(returns: Tensor, states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean return of every state, and whether its continuations have different returns.

        V[s] = mean of R[e] over the continuations e of s

    Args:
        returns: [E] float, reward units.
        states: [E] int64, the state in which each trajectory starts; -1 for none.
        count: S, the number of states; each has a continuation.

    Returns:
        V: [S] float, reward units; and [S] bool.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """
    began = states >= 0
    member, values = states[began], returns[began]
    totals = values.new_zeros(count).index_add_(0, member, values)
    lowest, highest = (
        values.new_zeros(count).scatter_reduce_(0, member, values, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    return totals / torch.bincount(member, minlength=count), highest - lowest > EQUAL_RETURNS


def state_modulation(
    values: Tensor,
    bases: Tensor,
    differ: Tensor,
    *,
    first: Literal["one", "released"] = "one",
    sharpen: bool = False,
    skip_equal: bool = False,
) -> Tensor:
    """Return the factor of each state's advantages: below 1 after a rise of value, above 1 after a fall.

        alpha[s] = exp(-d[s]),   d[s] = V[s] - V[s - 1]

    Args:
        values: [S] float, V; the states of a base are adjacent and in order.
        bases: [S] int64, equal for states of one base.
        differ: [S] bool, states whose continuations have different returns.
        first: d of a base's first state: 0 (`one`), or 1 - V (`released`).
        sharpen: Replace d by sign(d) |d|^1.5 / sum |d|^1.5 over the states of the base.
        skip_equal: Ignore states whose continuations have equal returns; their alpha is 1.

    Returns:
        [S] float.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """
    if skip_equal:
        alpha = torch.ones_like(values)
        alpha[differ] = state_modulation(
            values[differ], bases[differ], differ[differ], first=first, sharpen=sharpen
        )
        return alpha
    begins = torch.ones_like(differ)
    begins[1:] = bases[1:] != bases[:-1]
    start = 1 - values if first == "released" else torch.zeros_like(values)
    change = torch.where(begins, start, values - values.roll(1))
    if sharpen:
        power = change.abs() ** 1.5
        total = torch.where(bases == bases[:, None], power, 0.0).sum(1)
        change = change.sign() * power / torch.where(total > 0, total, 1.0)
    return torch.exp(-change)


def exploration_advantage(
    batch: Batch, context: Context, *, modulate: Modulate, divide_by_std: bool = False
) -> Tensor:
    """Return each continuation's return, centred in its state and modulated; [B, T], 0 on the base's part."""
    states = branch_states(batch)
    values, differ = state_values(batch.returns, states.member, len(states.points))
    alpha = modulate(values, states.bases, differ)
    centred = functional.group_relative_advantage(batch.returns, states.member, divide_by_std=divide_by_std)
    # The appended 0 is the value at index -1.
    advantages = centred * torch.cat([alpha, alpha.new_zeros(1)])[states.member]
    return functional.broadcast_to_tokens(advantages, batch.trajectory, tokens_after_branching(batch))


def informative_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the continuations' own action tokens in states whose continuations differ; [B, T] bool."""
    batch = mini.batch
    states = branch_states(batch)
    _, differ = state_values(batch.returns, states.member, len(states.points))
    learned = torch.cat([differ, differ.new_zeros(1)])[states.member]
    return tokens_after_branching(batch) & learned[batch.trajectory][:, None]


def drop_uninformative(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep the groups in which some state's continuations have different returns."""
    return [group for group in groups if _informative(group)]


def exploration_metrics(
    mini: MiniBatch, context: Context, *, modulate: Modulate, unit: AnchorUnit
) -> Mapping[str, float]:
    """Measure the share of states learned from, and the mean value, factor and anchor entropy in nats."""
    batch = mini.batch
    states = branch_states(batch)
    if not states.points:
        return {}
    values, differ = state_values(batch.returns, states.member, len(states.points))
    numbers = {"states_kept": float(differ.double().mean()), "state_value": float(values.mean())}
    if bool(differ.any()):
        numbers["state_factor"] = float(modulate(values, states.bases, differ)[differ].mean())
    played = {
        (group, episode.id): point_scores(episode, unit, "entropy")
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
        if episode.parent is None
    }
    anchors = [
        scores[point.turn, point.token]
        for group, point in states.points
        if (point.turn, point.token) in (scores := played.get((group, point.parent), {}))
    ]
    return numbers | ({"anchor_entropy": fmean(anchors)} if anchors else {})


def _informative(group: Group) -> bool:
    returns: dict[BranchPoint, list[float]] = defaultdict(list)
    for episode in group.finished:
        if episode.parent is not None:
            returns[episode.parent].append(episode.episode_return)
    return any(max(values) - min(values) > EQUAL_RETURNS for values in returns.values())
