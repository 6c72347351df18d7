"""Information that turns and prompts give about what a policy is to say: pure functions of its scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.special import logsumexp

Array = NDArray[np.float64]

_STD_FLOOR = 1e-3  # added to the deviation that the z-score divides by, as in the released code


@dataclass(frozen=True, slots=True)
class EntropyReduction:
    """Decrease of the entropy of a fixed text along the turns of an episode.

    Args:
        gains: IG_k = h_{k-1} - h_k, in nats.
        slope: The slope of the least-squares line through (k, h_k), in nats per turn.
        decreasing: The share of the steps with IG_k > 0.
        total: h_0 - h_K, in nats.
    """

    gains: tuple[float, ...]
    slope: float
    decreasing: float
    total: float


def entropy_reduction(entropies: Sequence[float]) -> EntropyReduction:
    """Return how conditional entropies h_0 … h_K fall.

    Args:
        entropies: h_k, the mean over the tokens of a text of the entropy of the next token after k turns, in
            nats; at least two.

    Raises:
        ValueError: If there are fewer than two.

    Source: arXiv:2508.20395, after its abstract and a reading by others.
    """
    if len(entropies) < 2:
        raise ValueError(f"{len(entropies)} entropies, wanted at least 2")
    values = np.asarray(entropies, dtype=np.float64)
    gains = -np.diff(values)
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(steps @ values / (steps @ steps))
    return EntropyReduction(
        tuple(gains.tolist()), slope, float(np.mean(gains > 0)), float(values[0] - values[-1])
    )


def align(entropies: Sequence[float], points: int) -> Array:
    """Return a curve at `points` equally spaced shares of its length, from its first value to its last.

    The interpolation is cubic between the values and never leaves their range, so no entropy is negative.

    >>> align([2.0, 1.0], 3).tolist()
    [2.0, 1.5, 1.0]

    Args:
        entropies: The values of a curve, at least two.
        points: The number of points, at least two.
    """
    places = np.linspace(0.0, 1.0, len(entropies))
    found: Array = PchipInterpolator(places, entropies)(np.linspace(0.0, 1.0, points))
    return found


@dataclass(frozen=True, slots=True)
class PromptInformation:
    """Dependence of replies on their prompts, in nats.

    Args:
        mutual_information: MI(X; Z), at most log N.
        conditional_entropy: H(Z | X).
        marginal_entropy: H(Z).
        per_token: The mutual information with each reply's part divided by its number of tokens.
        per_token_released: As in the released code, where marginals are of the means over tokens.
        z_score: `per_token_released`, divided by the deviation of those marginals over replies.
        retrieval_accuracy: The share of replies that are most likely after their own prompt.
        chance: The retrieval accuracy of a guess.
    """

    mutual_information: float
    conditional_entropy: float
    marginal_entropy: float
    per_token: float
    per_token_released: float
    z_score: float
    retrieval_accuracy: float
    chance: float


def prompt_information(
    scores: Array, lengths: Sequence[int], prompts: Sequence[int] | None = None
) -> PromptInformation:
    """Return how much replies say about the prompt that they were given to.

        marginal_i = logsumexp_j L[i, j] - log N
        MI = mean(L[i, i] - marginal_i),   H(Z | X) = -mean L[i, i],   H(Z) = -mean marginal_i

    A policy whose replies fit every prompt alike has collapsed to a template: MI is near 0, and H(Z) is not.

    Args:
        scores: L [N, N], log p(z_i | x_j) in nats: row i is a reply, column j a prompt.
        lengths: [N], the number of tokens of each reply, at least 1.
        prompts: [N], equal numbers for identical prompts, which count as one in the retrieval accuracy; None
            if all of them differ.

    Raises:
        ValueError: If shapes disagree or there is no reply.

    Source: RAGEN-2, 2026, arXiv:2604.06268, and its released code.
    """
    count = len(lengths)
    owners = np.arange(count) if prompts is None else np.asarray(prompts)
    if scores.shape != (count, count) or owners.shape != (count,) or not count:
        raise ValueError(f"scores {scores.shape} for {count} replies and {owners.shape} prompts")
    tokens = np.asarray(lengths, dtype=np.float64)
    own = np.diagonal(scores)
    marginal = logsumexp(scores, axis=1) - log(count)
    means = scores / tokens[:, None]
    mean_marginal = logsumexp(means, axis=1) - log(count)
    released = float(np.mean(np.diagonal(means) - mean_marginal))
    _, sizes = np.unique(owners, return_counts=True)
    return PromptInformation(
        mutual_information=float(np.mean(own - marginal)),
        conditional_entropy=float(-np.mean(own)),
        marginal_entropy=float(-np.mean(marginal)),
        per_token=float(np.mean((own - marginal) / tokens)),
        per_token_released=released,
        z_score=released / (float(np.std(mean_marginal)) + _STD_FLOOR),
        retrieval_accuracy=float(np.mean(owners[scores.argmax(axis=1)] == owners)),
        chance=float(np.sum((sizes / count) ** 2)),
    )
