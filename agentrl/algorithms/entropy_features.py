"""Entropies of turns, episodes and groups before the update, and the covariance that drives them."""

from torch import Tensor
from torch.nn import functional as F

from agentrl.algorithms import functional
from agentrl.algorithms.features import decisions, turn_exists
from agentrl.algorithms.hooks import MiniBatch, require_tensor, requires
from agentrl.algorithms.named_features import feature, feature_of, mini_batch_feature
from agentrl.config import Share
from agentrl.data.batch import Batch


@feature("episode_tokens")
def episode_tokens(batch: Batch) -> Tensor:
    """Return the number of action tokens of each episode; [E] int64."""
    return decisions(batch).valid.sum(dim=1)


@feature("turn_entropy")
@requires("entropy")
def turn_entropy(batch: Batch) -> Tensor:
    """Return the mean entropy of the action tokens of each turn; [E, K] float64, nats, 0 without any."""
    means, _ = functional.turn_means(
        _entropies(batch), batch.action_mask, batch.turns, batch.trajectory, len(batch.episodes)
    )
    # Turns at the end that no row holds have no tokens.
    return F.pad(means, (0, turn_exists(batch).shape[1] - means.shape[1]))


@feature("episode_entropy")
@requires("entropy", "episode_tokens")
def episode_entropy(batch: Batch) -> Tensor:
    """Return the mean entropy of the action tokens of each episode; [E] float64, nats, 0 without any."""
    total = decisions(batch).read(_entropies(batch)).sum(dim=1)
    return total / feature_of(batch, "episode_tokens").double().clamp(min=1)


@feature("group_entropy")
@requires("episode_entropy", "episode_tokens")
def group_entropy(batch: Batch) -> Tensor:
    """Return the mean `episode_entropy` of an episode's group; [E] float64, nats.

    Episodes without an action token are left out of the mean.
    """
    values, counted = feature_of(batch, "episode_entropy"), feature_of(batch, "episode_tokens") > 0
    same = ((batch.groups[:, None] == batch.groups) & counted).double()
    return same @ values / same.sum(dim=1).clamp(min=1)


@feature("entropy_quantile")
@requires("entropy")
def entropy_quantile(batch: Batch, share: Share) -> Tensor:
    """Return the entropy below which this share of all action tokens is; a number, nats, 0 without any.

    It is the entropy of a token: the one nearest to the quantile.
    """
    values = _entropies(batch)[batch.action_mask]
    # Sorted instead of torch.quantile, which takes 16 million values at most.
    index = round(share * max(0, len(values) - 1))
    return values.sort().values[index] if len(values) else values.new_zeros(())


@mini_batch_feature("covariance")
@requires("current")
def covariance(mini: MiniBatch) -> Tensor:
    """Return each token's part in the covariance of advantage and logprob; [B, T] float64.

    See `functional.covariance`; the means are over the tokens in the surrogate. Of a rollout batch, which has
    no current policy, it is taken under the policy before the update.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """
    current = mini.current
    logprobs = mini.batch.old_logprobs if current is None else current.logprobs
    return functional.covariance(
        mini.advantages.double(), require_tensor(logprobs, "old_logprobs").double(), mini.counted
    )


def _entropies(batch: Batch) -> Tensor:
    return require_tensor(batch.old_entropies, "old_entropies").double()
