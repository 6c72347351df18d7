"""Shares and entropies of clusters of trajectories, such as those with the same answer."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape


def cluster_shares(clusters: Tensor, groups: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Return the part of its group that is in the cluster of a trajectory.

        p_i = sum of w over the cluster of i / sum of w over the group of i,   w = exp(log_weights)

    Args:
        clusters: [E] int64, equal for trajectories of one cluster; a cluster is within one group.
        groups: [E] int64.
        log_weights: [E] float, such as log-probabilities; None weighs all trajectories equally.

    Returns:
        [E] float64.

    Raises:
        ValueError: If shapes disagree.

    Source: as the reward, Zhang et al. 2025, arXiv:2504.05812 (EMPO).
    """
    weights = _weights(clusters, groups, log_weights)
    return _sums(weights, clusters) / _sums(weights, groups)


def cluster_entropy(clusters: Tensor, groups: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Return the entropy of the distribution over the clusters of a trajectory's group.

        H = -sum_c p_c log p_c,   p as in `cluster_shares`

    With the mean log-probabilities of the trajectories as weights it is the semantic entropy of SEED-GRPO;
    without weights, that of EMPO.

    Args:
        clusters: [E] int64, as in `cluster_shares`.
        groups: [E] int64.
        log_weights: [E] float; None weighs all trajectories equally.

    Returns:
        [E] float64, nats, equal within a group.

    Raises:
        ValueError: If shapes disagree.

    Source: Chen et al. 2025, arXiv:2505.12346 (SEED-GRPO).
    """
    weights = _weights(clusters, groups, log_weights)
    # The weights of a cluster add up to its share.
    shares = weights / _sums(weights, groups)
    return _sums(-shares * cluster_shares(clusters, groups, log_weights).log(), groups)


def _weights(clusters: Tensor, groups: Tensor, log_weights: Tensor | None) -> Tensor:
    same_shape("clusters", clusters, "groups", groups)
    if log_weights is None:
        return torch.ones(len(groups), dtype=torch.float64, device=groups.device)
    same_shape("log_weights", log_weights, "groups", groups)
    values = log_weights.double()
    _, member = groups.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    highest = values.new_full((len(values),), -torch.inf).scatter_reduce(0, member, values, "amax")
    return (values - highest[member]).exp()


def _sums(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the sum over all entries with the same number, at each of them; [E]."""
    found, member = numbers.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return values.new_zeros(len(found)).index_add(0, member, values)[member]
