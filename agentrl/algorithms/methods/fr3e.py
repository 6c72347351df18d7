"""FR3E: go back to where the first return was least certain, and explore from there."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import fmean, quantiles
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import EQUAL_RETURNS, Algorithm, rollout_gap
from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.algorithms.methods.grpo import fixed_clip
from agentrl.algorithms.recipe import Presets, Recipe, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Episode, Group, Turn
from agentrl.errors import ConfigError
from agentrl.seeds import derive_seed

NEAR = 3  # decisions: points this close are one moment of doubt, to `quantile`

Unit = Literal["auto", "token", "turn"]
Score = Literal["entropy", "surprisal", "quantile"]
Modulate = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, bases, differ [S] -> [S]


@recipe("fr3e")
@dataclass(frozen=True)
class FR3E(Recipe):
    """First return, entropy-eliciting explore: continuations from the least certain points of a rollout.

    A task is played once, from the first observation to the end: the base. Its states are the first
    observation and the K points before its most uncertain decisions. From each of them M continuations
    are played; their mean return is the state's value. A continuation is compared with the others of its
    state, and its advantage is multiplied by exp(-(V_j - V_{j-1})), V_{j-1} being the value of the state
    before on the same base. Continuations are learned from, without the part that they share with the base;
    bases are not, nor are states whose continuations all have the same return. The factor is meant for
    returns within [0, 1]: a fall of 5 multiplies by 148. Where a base has fewer points
    than K, or was aborted, more continuations begin at the first observation.

    With several bases, one that succeeded and one that did not are explored, drawn with the seed.

    The preset `released` does what the released code does:
    - anchors are the sampled tokens of the lowest probability;
    - the first state's advantages are multiplied by exp(-(1 - V_0)), which shrinks them;
    - changes of value are sharpened, sign(d) |d|^1.5 / sum |d|^1.5 over the states of a base;
    - the state before is the one before among those that are learned from.
    Its mix of states after reordering by length is not reproduced.

        field         | paper   | released  | ours
        bases         | 1       | 4         | 1
        anchors       | 2       | 4         | 2
        continuations | 4       | 16        | 4
        score         | entropy | surprisal | entropy
        clip_low      | 0.22    | 0.2       | 0.2
        clip_high     | 0.28    | 0.3       | 0.28
        sharpen       | false   | true      | false
        alpha_root    | one     | released  | one

    The paper's numbers of bases, anchors and continuations are not known to us, and ours. Its temperature is
    1.

    Args:
        bases: first returns of a task.
        anchors: K, points of a base beside its beginning.
        continuations: M, of each state; a task has bases + min(bases, 2) * (K + 1) * M episodes, and when
            only one of two wanted bases is there to explore, it gets the continuations of both.
        anchor: before a `token` or before a `turn`; `auto` takes turns where the base has more than one.
        score: what makes a point uncertain: `entropy`, the `surprisal` of what was sampled, or `quantile`,
            the highest entropies of the upper quarter, more than three points apart. A turn's score is the
            mean over its decisions.
        clip_low: the ratio is held above 1 - clip_low.
        clip_high: and below 1 + clip_high.
        divide_by_std: divide centred returns by their standard deviation within the state.
        sharpen: sharpen changes of value, as above.
        alpha_root: factor of the first state: `one`, or exp(-(1 - V_0)) as `released`.
        parity: `official` is the preset `released`, but of the table it takes score, sharpen and alpha_root
            alone; `paper` says nothing.
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
    anchor: Unit = "auto"
    score: Score = "entropy"
    clip_low: Share = 0.2
    clip_high: Weight = 0.28
    divide_by_std: bool = False
    sharpen: bool = False
    alpha_root: Literal["one", "released"] = "one"
    parity: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        if self.parity == "official":
            if self.score == "quantile":
                raise ConfigError("score is 'quantile', but parity=official chooses anchors by surprisal")
            object.__setattr__(self, "score", "surprisal")

    def build(self) -> Algorithm:
        episodes = self.bases + min(self.bases, 2) * (self.anchors + 1) * self.continuations
        modulate = partial(
            state_modulation,
            first=self.alpha_root,
            sharpen=self.sharpen,
            skip_equal=self.preset == "released",
        )
        return Algorithm(
            select=keep_instructive,
            rollout=RolloutPlan(episodes=episodes, branch_policy=partial(Exploration, self)),
            advantage=partial(exploration_advantage, modulate=modulate, divide_by_std=self.divide_by_std),
            masks=(instructive_tokens,),
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=None),
            aggregation=functional.token_weights,
            diagnostics=(rollout_gap, partial(exploration_numbers, modulate=modulate, unit=self.anchor)),
        )


@requires("rollout:entropy")
@dataclass
class Exploration:
    """The rollouts of one task, as `FR3E` says; a `BranchPolicy`.

    Args:
        settings: of the method.
        budget: episodes of the task.
        seed: of the draw among bases.
        context: not read.
    """

    settings: FR3E
    budget: int
    seed: int
    context: Context
    _bases: list[Episode] = field(default_factory=list, init=False)

    def begin(self) -> Sequence[BranchPoint | None]:
        return [None] * self.settings.bases

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        return ()

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        if len(self._bases) == self.settings.bases:
            return ()
        self._bases.append(episode)
        return self._continuations() if len(self._bases) == self.settings.bases else ()

    def _continuations(self) -> Sequence[BranchPoint]:
        explored = explored_bases(self._bases, self.seed)
        # An aborted base has no points to go back to, but its beginning is that of the task.
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
    """At most one finished base that succeeded and one that did not, drawn with the seed."""
    finished = sorted((base for base in bases if not base.stop.aborted), key=lambda base: base.id)
    kinds = ([base for base in finished if base.success is success] for success in (True, False))
    return [kind[derive_seed(seed, "base", kind[0].success) % len(kind)] for kind in kinds if kind]


def anchor_points(
    base: Episode, count: int, *, unit: Unit = "auto", score: Score = "entropy"
) -> list[BranchPoint]:
    """The most uncertain points of an episode, in order; a tie goes to the earlier one.

    Args:
        base: with the entropies and logprobs of its decisions.
        count: of points; there are fewer where the episode has fewer.
        unit: as in `FR3E`.
        score: likewise.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """
    scores = point_scores(base, unit, score)
    places, values = list(scores), list(scores.values())
    order = sorted(range(len(values)), key=lambda index: -values[index])
    if score == "quantile":
        order = _apart(order, values)
    return [BranchPoint(base.id, *places[index]) for index in sorted(order[:count])]


def point_scores(base: Episode, unit: Unit, score: Score) -> dict[tuple[int, int], float]:
    """How uncertain each point of an episode is, in nats, by (turn, token) in order.

    The point before the first decision is left out: nothing was decided on the way to it.
    """
    decided = [_decisions(turn, score) for turn in base.turns]
    if unit == "turn" or (unit == "auto" and len(base.turns) > 1):
        points = {(turn, 0): fmean(values.values()) for turn, values in enumerate(decided) if values}
    else:
        points = {
            (turn, token): value for turn, values in enumerate(decided) for token, value in values.items()
        }
    return dict(islice(points.items(), 1, None))


def _decisions(turn: Turn, score: Score) -> dict[int, float]:
    values = [-logprob for logprob in turn.logprobs] if score == "surprisal" else turn.entropies
    return {
        token: value
        for token, (value, decided) in enumerate(zip(values, turn.sampled, strict=False))
        if decided
    }


def _apart(order: Sequence[int], values: Sequence[float]) -> list[int]:
    """Those of the upper quarter, each only if no better one is near."""
    if len(values) < 2:
        return list(order)
    bar = quantiles(values, n=4, method="inclusive")[2]
    chosen: list[int] = []
    for index in order:
        if values[index] >= bar and all(abs(index - other) > NEAR for other in chosen):
            chosen.append(index)
    return chosen


def state_values(returns: Tensor, states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean return of every state, and whether its continuations differ at all.

        V[s] = mean of R[e] over the continuations e of s

    Args:
        returns: [E] float, reward units.
        states: [E] int64, the state that each trajectory began in; -1 for none.
        count: S, of states; each has a continuation.

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
    """Weaken what is learned where the value rose along a base, strengthen it where the value fell.

        alpha[s] = exp(-d[s]),   d[s] = V[s] - V[s - 1]

    Args:
        values: [S] float, V, states of a base in order and next to each other.
        bases: [S] int64, equal for states of one base.
        differ: [S] bool, states whose continuations differ.
        first: d of a base's first state: 0 (`one`), or 1 - V (`released`).
        sharpen: replace d by sign(d) |d|^1.5 / sum |d|^1.5 over the states of the base.
        skip_equal: leave states whose continuations do not differ out of it all; their alpha is 1.

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


@dataclass(frozen=True)
class States:
    """The states that a batch's trajectories began in, in order along each base.

    Args:
        points: S of them, with the group that each belongs to.
        bases: [S] int64, equal for states of one base.
        member: [E] int64, the state of each trajectory, -1 for none: itself a base.
    """

    points: tuple[tuple[int, BranchPoint], ...]
    bases: Tensor
    member: Tensor


def explored_states(batch: Batch) -> States:
    """Find the states by where the episodes branched off; the order of rows and episodes plays no role."""
    device = batch.tokens.device
    found = [
        None if (point := episode.parent) is None else (group, point.parent, point.turn, point.token)
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
    ]
    keys = sorted({key for key in found if key is not None})
    number = {key: index for index, key in enumerate(keys)}
    lines = {line: index for index, line in enumerate(dict.fromkeys(key[:2] for key in keys))}
    return States(
        tuple((group, BranchPoint(base, turn, token)) for group, base, turn, token in keys),
        torch.tensor([lines[key[:2]] for key in keys], dtype=torch.int64, device=device),
        torch.tensor([-1 if key is None else number[key] for key in found], dtype=torch.int64, device=device),
    )


def exploration_advantage(
    batch: Batch, context: Context, *, modulate: Modulate, divide_by_std: bool = False
) -> Tensor:
    """Each continuation's return, centred within its state and modulated, where it is its own; [B, T]."""
    states = explored_states(batch)
    values, differ = state_values(batch.returns, states.member, len(states.points))
    alpha = modulate(values, states.bases, differ)
    centred = functional.group_relative_advantage(batch.returns, states.member, divide_by_std=divide_by_std)
    # The 0 at the end is what the index -1 finds.
    advantages = centred * torch.cat([alpha, alpha.new_zeros(1)])[states.member]
    return functional.spread(advantages, batch.trajectory, _own_tokens(batch))


def instructive_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """What continuations decided themselves, in states whose continuations differ; [B, T] bool."""
    batch = mini.batch
    states = explored_states(batch)
    _, differ = state_values(batch.returns, states.member, len(states.points))
    learned = torch.cat([differ, differ.new_zeros(1)])[states.member]
    return _own_tokens(batch) & learned[batch.trajectory][:, None]


def keep_instructive(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep the groups in which some state's continuations have different returns."""
    return [group for group in groups if _instructive(group)]


def exploration_numbers(
    mini: MiniBatch, context: Context, *, modulate: Modulate, unit: Unit
) -> Mapping[str, float]:
    """States: the share that is learned from, mean value, factor and entropy at the anchors (nats)."""
    batch = mini.batch
    states = explored_states(batch)
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


def _own_tokens(batch: Batch) -> Tensor:
    """Decisions since an episode left its base; [B, T] bool, nothing of a base."""
    turns = [
        len(episode.turns) if episode.parent is None else episode.parent.turn for episode in batch.episodes
    ]
    first = torch.tensor(turns, dtype=torch.int64, device=batch.tokens.device)
    return batch.sampled & (batch.turns >= first[batch.trajectory][:, None])


def _instructive(group: Group) -> bool:
    returns: dict[BranchPoint, list[float]] = defaultdict(list)
    for episode in group.finished:
        if episode.parent is not None:
            returns[episode.parent].append(episode.episode_return)
    return any(max(values) - min(values) > EQUAL_RETURNS for values in returns.values())
