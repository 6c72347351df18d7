"""FR3E: go back to the most uncertain points of a first rollout, and explore from there."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, mismatch_metrics, returns_differ
from agentrl.algorithms.branch_policies import AnchorExploration
from agentrl.algorithms.branching import AnchorUnit, RolloutPlan, Uncertainty
from agentrl.algorithms.clipped_recipe import fixed_clip
from agentrl.algorithms.features import BranchStates, anchor_entropies, branch_states, tokens_after_branching
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import Presets, Recipe, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Group

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

    KIND = "rollouts"
    CONFIDENCE = "official code read"
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
    OFFICIAL: ClassVar[Collection[str]] = ("score", "sharpen", "alpha_root")

    bases: Annotated[int, Interval(ge=1, le=10_000)] = 1
    anchors: Annotated[int, Interval(ge=0, le=10_000)] = 2
    continuations: Annotated[int, Interval(ge=2, le=10_000)] = 4
    anchor: AnchorUnit = "auto"
    score: Uncertainty = "entropy"
    clip_low: Share = 0.2
    clip_high: Weight = 0.28
    divide_by_std: bool = False
    sharpen: bool = False
    alpha_root: functional.FirstState = "one"
    parity: Literal["paper", "official"] = "paper"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        policy = partial(
            AnchorExploration, bases=self.bases, anchors=self.anchors, unit=self.anchor, score=self.score
        )
        modulate = partial(
            functional.state_modulation,
            first=self.alpha_root,
            sharpen=self.sharpen,
            skip_equal=self.preset == "released",
        )
        episodes = self.bases + min(self.bases, 2) * (self.anchors + 1) * self.continuations
        return Algorithm(
            select=drop_uninformative,
            rollout=RolloutPlan(episodes=episodes, branch_policy=policy),
            advantage=partial(exploration_advantage, modulate=modulate, divide_by_std=self.divide_by_std),
            masks=(informative_tokens,),
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=None),
            aggregation=functional.token_weights,
            diagnostics=(mismatch_metrics, partial(exploration_metrics, modulate=modulate, unit=self.anchor)),
        )


def drop_uninformative(groups: Sequence[Group], context: Context) -> Sequence[Group]:
    """Keep the groups in which some state's continuations have different returns."""
    return [group for group in groups if any(map(returns_differ, _returns_by_state(group)))]


def exploration_advantage(
    batch: Batch, context: Context, *, modulate: Modulate, divide_by_std: bool = False
) -> Tensor:
    """Return each continuation's return, centred in its state and modulated; [B, T], 0 on the base's part."""
    states, values, differ = _valued_states(batch)
    alpha = modulate(values, states.bases, differ)
    centred = functional.group_relative_advantage(batch.returns, states.member, divide_by_std=divide_by_std)
    advantages = centred * states.of_trajectories(alpha)
    return functional.broadcast_to_tokens(advantages, batch.trajectory, tokens_after_branching(batch))


def informative_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the continuations' own action tokens in states whose continuations differ; [B, T] bool."""
    states, _, differ = _valued_states(mini.batch)
    learned = states.of_trajectories(differ)[mini.batch.trajectory]
    return tokens_after_branching(mini.batch) & learned[:, None]


def exploration_metrics(
    mini: MiniBatch, context: Context, *, modulate: Modulate, unit: AnchorUnit
) -> Mapping[str, float]:
    """Measure the share of states learned from, and the mean value, factor and anchor entropy in nats."""
    states, values, differ = _valued_states(mini.batch)
    if not states.points:
        return {}
    numbers = {"states_kept": float(differ.double().mean()), "state_value": float(values.mean())}
    if bool(differ.any()):
        numbers["state_factor"] = float(modulate(values, states.bases, differ)[differ].mean())
    anchors = anchor_entropies(mini.batch, states, unit)
    return numbers | ({"anchor_entropy": fmean(anchors)} if anchors else {})


def _valued_states(batch: Batch) -> tuple[BranchStates, Tensor, Tensor]:
    """Return the states in which continuations start, and their `functional.state_values`."""
    states = branch_states(batch)
    return states, *functional.state_values(batch.returns, states.member, len(states.points))


def _returns_by_state(group: Group) -> Iterable[Sequence[float]]:
    returns: dict[BranchPoint, list[float]] = defaultdict(list)
    for episode in group.finished:
        if episode.parent is not None:
            returns[episode.parent].append(episode.episode_return)
    return returns.values()
