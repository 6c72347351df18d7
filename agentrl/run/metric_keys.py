"""The keys of the logged metrics: one rule, `stage/room/name`, and one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

STAGES = ("warm_start", "train")


@dataclass(frozen=True)
class Metric:
    """One metric, or several whose keys differ only where the pattern has a `*`.

    Args:
        key: The key after the stage, `room/name`.
        unit: The unit, or "share" for a part of 1.
        meaning: What it measures, in one line.
        old: The key that runs of schema 2 and older have in its place.
    """

    key: str
    unit: str
    meaning: str
    old: str | None = None


METRICS = (
    Metric("rollout/episodes", "episodes", "Episodes that were played.", "episodes"),
    Metric("rollout/aborted_rate", "share", "Episodes that an error ended; they teach nothing.", "aborted"),
    Metric("rollout/success_rate", "share", "Finished episodes that reached their goal.", "success"),
    Metric("rollout/success_rate/*", "share", "The same for one task type.", "success/*"),
    Metric("rollout/reward_mean", "reward", "Mean return of the finished episodes.", "return"),
    Metric("rollout/turns_mean", "turns", "Mean number of turns of an episode.", "turns"),
    Metric("rollout/invalid_rate", "share", "Turns whose action the environment did not accept.", "invalid"),
    Metric("rollout/reply_tokens", "tokens", "Tokens of all replies.", "reply_tokens"),
    Metric("rollout/action_tokens", "tokens", "Tokens that the policy chose among several.", "decisions"),
    Metric("rollout/entropy/token", "nats", "Mean entropy over action tokens.", "entropy/token"),
    Metric("rollout/entropy/turn", "nats", "Mean over turns of the turn's mean.", "entropy/turn"),
    Metric(
        "rollout/entropy/trajectory",
        "nats",
        "Mean over episodes of the mean over their turns.",
        "entropy/trajectory",
    ),
    Metric("rollout/entropy/token/*", "nats", "The same for one task type.", "entropy/token/*"),
    Metric("rollout/entropy/turn/*", "nats", "The same for one task type.", "entropy/turn/*"),
    Metric("rollout/entropy/trajectory/*", "nats", "The same for one task type.", "entropy/trajectory/*"),
    Metric("rollout/stop/*", "share", "Episodes that ended for this reason.", "stop/*"),
    Metric("rollout/episodes_kept", "share", "Episodes that are learned from.", "episodes_kept"),
    Metric("rollout/groups_kept", "share", "Groups that are learned from.", "groups_kept"),
    Metric("rollout/cut_observations", "observations", "Observations too long for the policy, and cut."),
    Metric("rollout/rounds", "rounds", "Times that tasks were drawn for the step.", "rounds"),
    Metric("rollout/retried", "episodes", "Aborted attempts that were played again.", "retried"),
    Metric("rollout/quarantined_tasks", "tasks", "Tasks that are no longer played.", "quarantined_tasks"),
    Metric("rollout/worker_restarts", "restarts", "Workers restarted since the start.", "worker_restarts"),
    Metric("rollout/branches/*", "episodes", "Episodes that branched off in this way.", "branches/*"),
    Metric(
        "rollout/staleness/*", "updates", "Updates between generation and learning (async).", "staleness/*"
    ),
    Metric("rollout/*/*", "", "A metric of one of several environments, `rollout/NAME/success_rate`."),
    Metric("learner/loss", "", "Loss: the policy loss and all terms.", "learner/loss"),
    Metric("learner/policy_loss", "", "Surrogate loss of the policy.", "learner/loss_policy"),
    Metric("learner/term/*", "", "One term of the loss, without its coefficient.", "learner/term/*"),
    Metric("learner/clip_ratio", "share", "Action tokens whose ratio is clipped.", "learner/clip_share"),
    Metric("learner/clip_ratio_high", "share", "The same, at the upper bound.", "learner/clip_share_high"),
    Metric("learner/mask_share", "share", "Action tokens that the masks leave in the policy loss."),
    Metric("learner/weight_mean", "", "Mean factor of their loss, the product of the weights."),
    Metric("learner/bound_lower", "ratio", "Mean lower bound of their ratio, if there is one."),
    Metric("learner/bound_upper", "ratio", "Mean upper bound of their ratio, if there is one."),
    Metric("learner/kl", "nats", "Mean of old minus new log-probability.", "learner/approx_kl"),
    Metric("learner/grad_norm", "", "Norm of the gradient before clipping.", "learner/grad_norm"),
    Metric("learner/learning_rate", "", "Learning rate of the last update.", "learner/learning_rate"),
    Metric(
        "learner/weights_moved", "share", "Weights with a gradient that changed.", "learner/weights_moved"
    ),
    Metric("learner/entropy/token", "nats", "As in the rollout, by the learner.", "learner/entropy_token"),
    Metric("learner/entropy/turn", "nats", "As in the rollout, by the learner.", "learner/entropy_turn"),
    Metric(
        "learner/entropy/trajectory",
        "nats",
        "As in the rollout, by the learner.",
        "learner/entropy_trajectory",
    ),
    Metric("learner/trajectories", "episodes", "Episodes of the batch.", "learner/trajectories"),
    Metric("learner/tokens", "tokens", "Tokens of the batch, without padding.", "learner/tokens"),
    Metric("learner/action_tokens", "tokens", "Tokens that are learned from.", "learner/decisions"),
    Metric("learner/taught_tokens", "tokens", "Those in the policy loss whose advantage is not 0."),
    Metric(
        "learner/effective_episodes",
        "episodes",
        "(sum w)^2 / sum w^2, w being the mean size of an episode's advantages.",
    ),
    Metric("learner/advantage_size", "", "Mean size of the advantages of the taught tokens."),
    Metric("learner/updates", "updates", "Optimiser steps that were applied.", "learner/updates"),
    Metric("learner/reward_model/loss", "", "Loss of the method's reward model, before its step."),
    Metric("learner/reward_model/grad_norm", "", "Norm of its gradient before clipping."),
    Metric("learner/reward_model/skipped", "", "1 if its step was not finite, and not applied."),
    Metric(
        "learner/skipped_updates",
        "updates",
        "Optimiser steps that were not finite.",
        "learner/skipped_updates",
    ),
    Metric(
        "algorithm/mismatch/mean",
        "nats",
        "Mean |log-probability of the learner - of the engine| of the action tokens.",
        "learner/drift_mean",
    ),
    Metric("algorithm/mismatch/max", "nats", "The largest of them.", "learner/drift_max"),
    Metric("algorithm/mismatch/kl", "nats", "Estimate of KL(engine || learner).", "learner/drift_kl"),
    Metric(
        "algorithm/mismatch/capped", "share", "Tokens whose weight the cap limits.", "learner/drift_capped"
    ),
    Metric("algorithm/mismatch/rejected", "share", "Tokens that `mis` drops."),
    Metric("algorithm/entropy_band/*", "", "EPO's band of allowed entropies.", "learner/corridor/*"),
    Metric("algorithm/replay/*", "", "The replay buffer and what was learned from it.", "learner/replay/*"),
    Metric("algorithm/*", "", "A diagnostic of the method; its docstring says what it is.", "learner/*"),
)
# One quantity had two keys.
_DUPLICATES = {
    "learner/logprob_gap_mean": "algorithm/mismatch/mean",
    "learner/logprob_gap_max": "algorithm/mismatch/max",
}


def current_key(key: str, stage: str) -> str:
    """Return the key of today for the key of a metric, which may be that of an older run.

    >>> current_key("learner/approx_kl", "train")
    'train/learner/kl'
    """
    if key in ("stage", "step") or key.startswith(tuple(f"{known}/" for known in STAGES)):
        return key
    return f"{stage}/{_DUPLICATES.get(key) or _renamed(key)}"


def current_keys(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return metrics of a stage by the keys of today."""
    return {current_key(key, stage): value for key, value in values.items()}


def find_metric(key: str) -> Metric | None:
    """Return the row of the table for a key with its stage, None if the table has none."""
    stage, _, rest = key.partition("/")
    if stage not in STAGES:
        return None
    return next((metric for metric in METRICS if fnmatchcase(rest, metric.key)), None)


def metrics_page() -> str:
    """Return the table in Markdown: the page `docs/metrics.md`."""
    rows = "\n".join(f"| `{metric.key}` | {metric.unit} | {metric.meaning} |" for metric in METRICS)
    return f"{_INTRODUCTION}\n| key, after the stage | unit | what it measures |\n|---|---|---|\n{rows}\n"


_INTRODUCTION = """# Metrics

Each row of a run's `metrics.jsonl` has a `stage` (`warm_start` or `train`), a `step`, and metrics whose keys
are `stage/room/name`, such as `train/rollout/success_rate` and `warm_start/learner/loss`. A `*` stands for a
task type, a stop reason, or a name that the method gives. Older runs have other keys; they are read under
these.

Where `env` is a list, the metrics of episodes are those of all environments together, without task types, and
again those of each: `train/rollout/ALFWorld/success_rate`, `train/rollout/ALFWorld/success_rate/TASK_TYPE`.
"""


def _renamed(key: str) -> str:
    for metric in METRICS:
        if metric.old is not None and fnmatchcase(key, metric.old):
            return metric.key.replace("*", key[metric.old.index("*") :]) if "*" in metric.old else metric.key
    return f"algorithm/{key}"
