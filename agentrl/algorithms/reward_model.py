"""A language model beside the policy whose scores are rewards, as an algorithm asks the learner for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires
from agentrl.data.batch import Batch

ModelLoss = Callable[[Tensor, Batch, Context], Tensor]


@dataclass(frozen=True)
class RewardModel:
    """Language model that begins as a copy of the policy, and that the learner trains on each rollout batch.

    In every training step the learner scores the batch under the model, takes one step of AdamW down the
    gradient of `loss`, and scores the batch again. A component marked `@requires("reward_model")` reads the
    result in `Batch.reward_logprobs`. As the advantages come after it, they see the model of this step.

    Args:
        loss: (log-probabilities of the action tokens under the model, [B, T] in nats and 0 elsewhere; rollout
            batch; context) -> a number that can be differentiated by them. It may couple all rows. It reads
            `Batch.reference_logprobs` if it is marked `@requires("reference")`.
        learning_rate: The learning rate of AdamW, without weight decay, warm-up or schedule.
        clip_gradient: The largest norm of the gradient, to which a longer one is scaled.
    """

    loss: ModelLoss
    learning_rate: float
    clip_gradient: float


@requires("reference", "reward_model")
def outcome_loss(logprobs: Tensor, batch: Batch, context: Context, *, beta: float) -> Tensor:
    """Return the mean cross entropy of the successes, over the episodes with an action token."""
    scores, present, successes = _log_odds(logprobs, batch, beta)
    return functional.outcome_cross_entropy(scores[present], successes[present])


@requires("reference", "reward_model")
def outcome_metrics(rollout: MiniBatch, context: Context, *, beta: float) -> Mapping[str, float]:
    """Measure the reward model after its step.

    Returns:
        reward_model/accuracy, the share of the episodes whose outcome it guesses, and reward_model/margin,
        its mean log-odds of successes minus those of failures; each only if there is something to measure.
    """
    logprobs = require_tensor(rollout.batch.reward_logprobs, "reward_model")
    scores, present, successes = _log_odds(logprobs, rollout.batch, beta)
    won, lost = scores[present & successes], scores[present & ~successes]
    found = {}
    if len(won) + len(lost):
        found["reward_model/accuracy"] = float(((scores > 0) == successes)[present].double().mean())
    if len(won) and len(lost):
        found["reward_model/margin"] = float(won.mean() - lost.mean())
    return found


def token_gaps(batch: Batch, logprobs: Tensor) -> Tensor:
    """Return by how much action tokens are likelier than under the reference; [B, T] float64, nats."""
    reference = require_tensor(batch.reference_logprobs, "reference").double()
    return torch.where(batch.action_mask, logprobs.double() - reference, 0.0)


def _log_odds(logprobs: Tensor, batch: Batch, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return each episode's log-odds of success [E], whether it has an action token, and its success."""
    gaps = token_gaps(batch, logprobs).sum(dim=1)
    zeros = gaps.new_zeros(len(batch.episodes))
    scores = beta * zeros.index_add(0, batch.trajectory, gaps)
    tokens = zeros.index_add(0, batch.trajectory, batch.action_mask.sum(dim=1).double())
    won = torch.tensor([episode.success for episode in batch.episodes], dtype=torch.bool)
    return scores, tokens > 0, won.to(gaps.device)
