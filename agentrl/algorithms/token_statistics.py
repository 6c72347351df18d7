"""Statistics of a token's distribution that components ask for by name.

One function, in any file that is imported, adds one:

    @statistic("top_probability")
    def top_probability(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits.softmax(dim=-1).amax(dim=-1)

A component asks for it with `@requires("top_probability")` and reads it with
`token_statistic(batch, "top_probability")`. With the suffix `:grad` it gets a gradient in the loss.
`@teacher_statistic` adds one that compares the distribution with that of a teacher.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, TypeVar

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from agentrl.algorithms.functional.aggregation import Unit, sequence_members
from agentrl.algorithms.functional.divergence import interpolated_divergence
from agentrl.algorithms.named_functions import NamedFunctions
from agentrl.config import PositiveShare, Share
from agentrl.data.batch import Batch
from agentrl.errors import RequirementError

STATISTICS = "token statistics"  # what a learner provides that computes them
GRADIENT = ":grad"
TEACHER = "teacher"  # what a learner provides that has one

Function = TypeVar("Function", bound=Callable[..., Tensor])
OfLogits = Callable[[Tensor, Tensor], Tensor]
OfLogprobs = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Statistics:
    """Statistics to compute in a forward pass, by the name that components read them by.

    Args:
        of_logits: The functions (logits [N, V], tokens [N]) -> [N] or [N, k].
        of_logprobs: The functions (logprobs [B, T], batch) -> [B, T].
        of_teacher: The functions (logits [N, V], the teacher's logits [N, V]) -> [N].
    """

    of_logits: Mapping[str, OfLogits]
    of_logprobs: Mapping[str, OfLogprobs]
    of_teacher: Mapping[str, OfLogits] = field(default_factory=dict)

    @property
    def of_pass(self) -> tuple[str, ...]:
        """Return the names of those that a forward pass computes, in its order."""
        return *self.of_logits, *self.of_teacher


NOTHING = Statistics({}, {})


_functions = NamedFunctions("statistic", inputs=2)
# By statistic of log-probabilities, the reasons why it has no gradient, by argument.
_of_logprobs: dict[str, Mapping[str, str]] = {}
_of_teacher: set[str] = set()


def statistic(name: str) -> Callable[[Function], Function]:
    """Register a statistic of each token's distribution.

    The function takes `logits` [N, V], at least float32 and divided by the sampling temperature, and `tokens`
    [N] int64, the columns of the tokens that were sampled. It returns [N] or [N, k]. Where a token was
    constrained, the columns are the allowed ids. A logit of -inf has probability 0, and no value or gradient
    may become nan because of it. A third parameter is the argument after the colon; its type declares the
    bounds.

    Raises:
        ConfigError: If another function has the name.
    """
    return partial(_register, name, constant=None)


def sequence_statistic(
    name: str, constant: Mapping[str, str] | None = None
) -> Callable[[Function], Function]:
    """Register a statistic of the log-probabilities of a sequence.

    The function takes `logprobs` [B, T] and the batch, and returns [B, T]. A third parameter is the argument.
    With a gradient it sees a micro-batch, so that its value must depend on a row alone.

    Args:
        name: The name to require it by.
        constant: The arguments for which it depends on several rows and has no gradient, with the reason.

    Raises:
        ConfigError: If another function has the name.
    """
    return partial(_register, name, constant=constant or {})


def teacher_statistic(name: str) -> Callable[[Function], Function]:
    """Register a statistic that compares each token's distribution with that of the teacher.

    The function takes `logits` and `teacher_logits`, both as in `statistic`, and returns [N]. It runs over
    one chunk of tokens at a time. A third parameter is the argument.

    Raises:
        ConfigError: If another function has the name.
    """

    def register(function: Function) -> Function:
        _functions.add(name, function)
        _of_teacher.add(name)
        return function

    return register


def _register(name: str, function: Function, *, constant: Mapping[str, str] | None) -> Function:
    _functions.add(name, function)
    if constant is not None:
        _of_logprobs[name] = constant
    return function


def statistic_usages() -> list[str]:
    """Return how each registered statistic is asked for, as in `topk:K`, sorted."""
    return sorted(map(_functions.usage, _functions))


def is_statistic(requirement: str) -> bool:
    """Return whether a requirement has the name of a registered statistic."""
    return requirement.partition(":")[0] in _functions


def statistic_fault(requirement: str) -> str | None:
    """Return why a requirement is not a statistic that can be computed; None if it is, or resembles none."""
    if not is_statistic(requirement):
        return _functions.suggestion(requirement.partition(":")[0])
    try:
        _shape(requirement)
    except RequirementError as error:
        return str(error)
    return None


def scored_statistics(requires: Iterable[str]) -> Statistics:
    """Return what the pass without gradient computes.

    A statistic with gradient describes the current policy: it is among them only if a component requires
    `current`, which may be taken from this pass.
    """
    names = frozenset(requires)
    return _resolved(names if "current" in names else (name for name in names if not _with_gradient(name)))


def current_statistics(requires: Iterable[str]) -> Statistics:
    """Return what `MiniBatch.current` holds: all that is required, with or without gradient."""
    return _resolved(requires)


def loss_statistics(requires: Iterable[str]) -> Statistics:
    """Return what the pass with gradient computes."""
    return _resolved(filter(_with_gradient, requires))


def reads_statistics(requires: Iterable[str]) -> bool:
    """Return whether a component with these requirements reads statistics of the scoring pass."""
    return any(is_statistic(name) and not _with_gradient(name) for name in requires)


def reads_teacher(requires: Iterable[str]) -> bool:
    """Return whether a component with these requirements reads a teacher."""
    return any(name == TEACHER or compares_with_teacher(name) for name in requires)


def compares_with_teacher(requirement: str) -> bool:
    """Return whether a requirement is a statistic that compares the policy with a teacher."""
    return requirement.partition(":")[0] in _of_teacher


def numbers_per_token(statistics: Statistics) -> int:
    """Return how many numbers the statistics hold for each token."""
    return sum(math.prod(_shape(name)) for name in (*statistics.of_pass, *statistics.of_logprobs))


def empty_extras(statistics: Statistics, like: Tensor) -> dict[str, Tensor]:
    """Return zeros for every statistic of a pass, [B, T] or [B, T, k], with the dtype of `like` [B, T]."""
    return {name: like.new_zeros((*like.shape, *_shape(name))) for name in statistics.of_pass}


def _resolved(requires: Iterable[str]) -> Statistics:
    # Sorted, so that all ranks exchange them in the same order.
    names = sorted({name.removesuffix(GRADIENT) for name in requires if is_statistic(name)})
    if not names:
        return NOTHING
    bound = {name: _bound(name) for name in names}
    own, taught = (
        {name: function for name, function in bound.items() if belongs(name)}
        for belongs in (_is_of_logits, compares_with_teacher)
    )
    others = {name: function for name, function in bound.items() if name not in own | taught}
    return Statistics(own, others, taught)


def _is_of_logits(requirement: str) -> bool:
    name = requirement.partition(":")[0]
    return name not in _of_logprobs and name not in _of_teacher


def _with_gradient(requirement: str) -> bool:
    return requirement.endswith(GRADIENT)


def _bound(requirement: str) -> Callable[..., Tensor]:
    """Return a statistic's function with the argument of the requirement.

    Raises:
        RequirementError: If the argument is missing, superfluous or out of bounds, or has no gradient.
    """
    name, _, argument = requirement.removesuffix(GRADIENT).partition(":")
    constant = _of_logprobs.get(name, {})
    if _with_gradient(requirement) and argument in constant:
        raise RequirementError(f"it has no gradient: {constant[argument]}")
    return _functions.bind(requirement.removesuffix(GRADIENT))


def _shape(requirement: str) -> tuple[int, ...]:
    """Return the shape of a statistic for one token, () or (k,), by calling it on two tokens.

    Raises:
        RequirementError: If it returns another shape, or its argument is refused.
    """
    function = _bound(requirement)
    if not _is_of_logits(requirement):
        return ()
    # One choice only, as at some constrained tokens.
    found = function(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    if found.dim() not in (1, 2) or len(found) != 2:
        raise RequirementError(f"it returned shape {tuple(found.shape)} for 2 tokens, wanted [N] or [N, k]")
    return tuple(found.shape[1:])


def _log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and p; log p is 0 where p is 0 by a logit of -inf, so that p log p is 0 there."""
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.masked_fill(logits == -torch.inf, 0.0), logprobs.exp()


@statistic("topk")
def top_probabilities(logits: Tensor, tokens: Tensor, k: Annotated[int, Interval(ge=1, le=1000)]) -> Tensor:
    """Return the k largest probabilities, largest first; 0 beyond the number of choices; [N, k].

    What they leave out of 1 is the tail, as in the lumped entropy -sum p ln p - tail ln tail (ARES).
    """
    probabilities = logits.softmax(dim=-1)
    found = probabilities.topk(min(k, logits.shape[-1]), dim=-1).values
    return F.pad(found, (0, k - found.shape[-1]))


@statistic("top_p_entropy")
def top_p_entropy(logits: Tensor, tokens: Tensor, p: Annotated[float, Interval(gt=0, lt=1)]) -> Tensor:
    """Return the entropy of the most likely tokens whose cumulative probability stays below p; [N] nats.

        S = the longest prefix, by falling probability, with sum_{v in S} p_v < p
        q = p_v / sum_{u in S} p_u,   H = -sum_{v in S} q_v log q_v,   0 if S is empty

    The token that crosses p is dropped. No gradient flows through the choice of S.

    Source: SIREN, arXiv:2509.25133 (its released code).
    """
    return _nucleus_entropy(logits, p, inclusive=False)


@statistic("top_p_entropy_inclusive")
def top_p_entropy_inclusive(logits: Tensor, tokens: Tensor, p: PositiveShare) -> Tensor:
    """Return the `top_p_entropy` that also counts the token with which the cumulative probability reaches p.

    This is the set from which top-p sampling draws. With p = 1 it is the entropy.
    """
    return _nucleus_entropy(logits, p, inclusive=True)


def _nucleus_entropy(logits: Tensor, p: float, *, inclusive: bool) -> Tensor:
    ordered = logits.sort(dim=-1, descending=True, stable=True).values
    logprobs, probabilities = _log_probabilities(ordered)
    reached = probabilities.detach().cumsum(dim=-1)
    kept = (reached - probabilities.detach() if inclusive else reached) < p
    some = kept.any(dim=-1)
    total = torch.where(some, torch.where(kept, probabilities, 0.0).sum(dim=-1), 1.0)
    mean = torch.where(kept, probabilities * logprobs, 0.0).sum(dim=-1) / total
    return torch.where(some, total.log() - mean, 0.0)


@statistic("log_z_minp")
def log_minp_mass(logits: Tensor, tokens: Tensor, share: PositiveShare) -> Tensor:
    """Return the log of the probability that min-p filtering keeps; [N], at most 0.

        log Z = log sum_v p_v [p_v >= share * max p]

    A sampled token that is kept (`in_minp`) has log-probability log p - log Z under the filtered policy.

    Source: Lp-Reg, arXiv:2510.03222.
    """
    kept = _kept_by_minp(logits, share)
    return logits.masked_fill(~kept, -torch.inf).logsumexp(dim=-1) - logits.logsumexp(dim=-1)


@statistic("in_minp")
def in_minp(logits: Tensor, tokens: Tensor, share: PositiveShare) -> Tensor:
    """Return 1 where min-p filtering keeps the sampled token, p >= share * max p, else 0; [N]."""
    kept = _kept_by_minp(logits, share)
    return kept.gather(1, tokens[:, None]).squeeze(1).to(logits.dtype)


def _kept_by_minp(logits: Tensor, share: float) -> Tensor:
    return logits >= logits.amax(dim=-1, keepdim=True) + math.log(share)


@statistic("entropy_change")
def entropy_change(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return sum_v p_v^2 (log p_v + H); [N] nats.

    With dH/dz_v = -p_v (log p_v + H), a step e (onehot(t) - p) on the logits changes the entropy by
    e (sum_v p_v^2 (log p_v + H) - p_t (log p_t + H)) to first order: the exact form of STEER's weight.
    """
    logprobs, probabilities = _log_probabilities(logits)
    entropies = -(probabilities * logprobs).sum(dim=-1, keepdim=True)
    return (probabilities.square() * (logprobs + entropies)).sum(dim=-1)


@statistic("logprob_at")
def logprob_at(logits: Tensor, tokens: Tensor, factor: Annotated[float, Interval(ge=0.01, le=100)]) -> Tensor:
    """Return the sampled token's log-probability at `factor` times the sampling temperature; [N] nats.

    Source: DCPO in the released code of arXiv:2510.08141, where the sampling temperature is 1.
    """
    return (logits / factor).log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


@sequence_statistic(
    "sequence_logprob",
    constant={"trajectory": "a trajectory's rows may be in several micro-batches; a turn's are not"},
)
def sequence_logprob(logprobs: Tensor, batch: Batch, sequence: Unit = "turn") -> Tensor:
    """Return the sum of log-probabilities over a sequence's action tokens, at each of them; [B, T] nats.

    A sequence is a turn's reply, or a whole trajectory with all its rows.
    """
    mask = batch.action_mask
    member, count = sequence_members(mask, batch.turns, batch.trajectory, sequence)
    values = torch.where(mask, logprobs, 0.0).double()  # so that the order of rows does not matter
    sums = values.new_zeros(count).index_add(0, member.flatten(), values.flatten())
    return torch.where(mask, sums[member], 0.0).to(logprobs.dtype)


@teacher_statistic("teacher_divergence")
def teacher_divergence(logits: Tensor, teacher_logits: Tensor, interpolation: Share) -> Tensor:
    """Return the divergence from the teacher's distribution; [N] nats. See `interpolated_divergence`.

    The argument is 1 for the reverse KL(policy || teacher), 0 for the forward one, and else the weight of
    the teacher in Jensen and Shannon's mixture.
    """
    return interpolated_divergence(logits, teacher_logits, interpolation)
