"""Mathematics of the algorithms as pure functions. Position t describes token t; masked ones are ignored.

Letters: B rows, T tokens per row, E trajectories, K turns of the longest one, V size of the vocabulary. An
action token is a token that the policy sampled. Masks say which tokens count, usually the action tokens.
Entropies and logprobs are in nats.
"""

from agentrl.algorithms.functional.advantage import (
    Singleton,
    entropy_factor,
    entropy_modulated_advantage,
    entropy_modulation,
    entropy_scaled_advantage,
    group_relative_advantage,
    leave_one_out_advantage,
    relative_certainty,
    whiten,
)
from agentrl.algorithms.functional.aggregation import (
    Unit,
    constant_weights,
    masked_mean,
    sequence_weights,
    token_weights,
    trajectory_weights,
)
from agentrl.algorithms.functional.branching import (
    FirstState,
    branch_score,
    future_ratio,
    influence_scores,
    initial_rollouts,
    state_modulation,
    state_values,
    tree_cost,
    tree_episodes,
)
from agentrl.algorithms.functional.clusters import cluster_entropy, cluster_shares
from agentrl.algorithms.functional.divergence import (
    bounded_bonus,
    interpolated_divergence,
    symmetric_divergence,
    taken_divergence,
)
from agentrl.algorithms.functional.entropies import (
    entropy,
    entropy_band_indicator,
    entropy_band_violation,
    entropy_means,
    top_k_entropy,
)
from agentrl.algorithms.functional.implicit import (
    implicit_rewards,
    leave_one_out_rewards,
    outcome_cross_entropy,
    over_largest_return,
)
from agentrl.algorithms.functional.layout import (
    broadcast_to_tokens,
    broadcast_turns_to_tokens,
    turn_means,
    unroll,
)
from agentrl.algorithms.functional.novelty import count_bonuses, elliptical_bonuses, error_increases
from agentrl.algorithms.functional.redistribution import redistribution_loss
from agentrl.algorithms.functional.returns import (
    EQUAL_RETURNS,
    Hierarchical,
    discounted_returns,
    gae,
    hierarchical_gae,
    overlong_penalty,
)
from agentrl.algorithms.functional.surrogate import (
    clipped,
    clipped_surrogate,
    covariance,
    kl_k1,
    kl_k2,
    kl_k3,
    probability_ratio,
    sequence_ratio,
    stop_gradient_clipped_surrogate,
    truncated_importance,
    value_loss,
)
from agentrl.algorithms.functional.uncertainty import is_flat, token_uncertainty, turn_uncertainty

__all__ = [
    "EQUAL_RETURNS",
    "FirstState",
    "Hierarchical",
    "Singleton",
    "Unit",
    "bounded_bonus",
    "branch_score",
    "broadcast_to_tokens",
    "broadcast_turns_to_tokens",
    "clipped",
    "clipped_surrogate",
    "cluster_entropy",
    "cluster_shares",
    "constant_weights",
    "count_bonuses",
    "covariance",
    "discounted_returns",
    "elliptical_bonuses",
    "entropy",
    "entropy_band_indicator",
    "entropy_band_violation",
    "entropy_factor",
    "entropy_means",
    "entropy_modulated_advantage",
    "entropy_modulation",
    "entropy_scaled_advantage",
    "error_increases",
    "future_ratio",
    "gae",
    "group_relative_advantage",
    "hierarchical_gae",
    "implicit_rewards",
    "influence_scores",
    "initial_rollouts",
    "interpolated_divergence",
    "is_flat",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out_advantage",
    "leave_one_out_rewards",
    "masked_mean",
    "outcome_cross_entropy",
    "over_largest_return",
    "overlong_penalty",
    "probability_ratio",
    "redistribution_loss",
    "relative_certainty",
    "sequence_ratio",
    "sequence_weights",
    "state_modulation",
    "state_values",
    "stop_gradient_clipped_surrogate",
    "symmetric_divergence",
    "taken_divergence",
    "token_uncertainty",
    "token_weights",
    "top_k_entropy",
    "trajectory_weights",
    "tree_cost",
    "tree_episodes",
    "truncated_importance",
    "turn_means",
    "turn_uncertainty",
    "unroll",
    "value_loss",
    "whiten",
]
