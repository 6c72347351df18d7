"""DPPO: a token is clipped by how far its probability has moved, not by how many times."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, token_ratio
from agentrl.algorithms.clipped_recipe import build_plain
from agentrl.algorithms.hooks import ADAPTIVE_BOUNDS, Bounds, Context, MiniBatch, Outputs, Term, trait
from agentrl.algorithms.importance import sampler_ratio
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, Weight
from agentrl.errors import ConfigError

RAREST = -20.0  # nats; below, the bounds of the ratio would not be finite in single precision
Divergence = Callable[[Tensor], tuple[Tensor, Tensor]]


@recipe("dppo")
@dataclass(frozen=True)
class DPPO(Recipe):
    """Divergence proximal policy optimisation: the bounds are those of a token's probability.

        loss = mean of -A r,   r = p / mu,   but no gradient where (A > 0, p > upper) or (A < 0, p < lower)
        tv: lower, upper = mu - delta, mu + delta
        kl: both edges of mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)) <= delta

    p is the probability of the token and mu the one at which the engine sampled it. A rare token may become
    many times more likely, while the bounds of a frequent one are narrow. Ratios are relative to the sampler,
    so that its mismatch is corrected as well. With delta 1, and if the sampler is the learner, it is its base
    without a clip.

        field                 | paper | released | ours
        base.name             | grpo  | grpo     | grpo
        base.preset           | paper | released | ours
        base.kl_coefficient   | 0.0   | 0.0      | 0.0
        log_ratio_coefficient | 0.0   | 0.001    | 0.0

    For `kl` the published delta is 0.05. `released` is the default loss of prime-rl, which adds (log r)^2 on
    all tokens and has the mean over tokens; its option that drops both signs is left out, and so is the limit
    of 20 on r in verl. As in PPO, the value of a token beyond its bound is that of the bound, where the code
    has 0; the gradient is the same.

    Args:
        base: The recipe that provides the advantage, selection, rewards and terms.
        delta: The bound of the divergence, in units of probability (`tv`) or nats (`kl`).
        divergence: Between the two probabilities of the sampled token: total variation or Bernoulli KL.
        log_ratio_coefficient: The coefficient of the mean of (log r)^2 in the loss.

    Source: Qi et al. 2026, arXiv:2602.04879.
    """

    KIND = "clipping"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}},
        "released": {"base": {"name": "grpo", "preset": "released"}, "log_ratio_coefficient": 1e-3},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    delta: PositiveShare = 0.2
    divergence: Literal["tv", "kl"] = "tv"
    log_ratio_coefficient: Weight = 0.0

    def build(self) -> Algorithm:
        """Build the base with ratios to the sampler and the bounds of probabilities."""
        base = build_plain(self.base, self.name)
        if base.ratio is not token_ratio:
            raise ConfigError(
                f"dppo: it would replace the ratio of base {self.base.name!r}, wanted a base with the ratio "
                "of single tokens to the old policy"
            )
        bounds = total_variation_bounds if self.divergence == "tv" else kl_bounds
        terms = base.terms
        if self.log_ratio_coefficient:
            terms = (*terms, Term("log_ratio", squared_log_ratio, self.log_ratio_coefficient))
        clip = partial(probability_clip, divergence=partial(bounds, delta=self.delta))
        return replace(base, ratio=sampler_ratio, clip=clip, terms=terms)


@trait(ADAPTIVE_BOUNDS)
def probability_clip(mini: MiniBatch, context: Context, *, divergence: Divergence) -> Bounds:
    """Bound the ratio of every token to that of the bounds of its probability, without a dual clip."""
    batch = mini.batch
    sampled = torch.where(batch.action_mask, batch.logprobs, 0.0).double().clamp(min=RAREST).exp()
    lower, upper = (edge / sampled for edge in divergence(sampled))
    return Bounds(lower.to(batch.logprobs.dtype), upper.to(batch.logprobs.dtype))


def squared_log_ratio(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    """Return the squared log of the ratio to the sampler at every token; [B, T] nats^2."""
    return 2 * functional.kl_k2(outputs.logprobs, mini.batch.logprobs)


def total_variation_bounds(sampled: Tensor, *, delta: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities at a total variation of `delta` from the sampled ones; [B, T] each."""
    return sampled - delta, sampled + delta


def kl_bounds(sampled: Tensor, *, delta: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities between which KL(sampled || p) is at most `delta` nats; [B, T] each."""
    return _edge(sampled, torch.zeros_like(sampled), delta), _edge(sampled, torch.ones_like(sampled), delta)


def _edge(sampled: Tensor, far: Tensor, delta: float) -> Tensor:
    """Return, by bisection, the probability between `sampled` and `far` with a divergence of `delta`."""
    near = sampled
    for _ in range(60):
        middle = (near + far) / 2
        inside = bernoulli_kl(sampled, middle) <= delta
        near, far = torch.where(inside, middle, near), torch.where(inside, far, middle)
    return near


def bernoulli_kl(sampled: Tensor, other: Tensor) -> Tensor:
    """Return the KL divergence between two coins with these probabilities of the token; [B, T] nats."""
    return torch.xlogy(sampled, sampled / other) + torch.xlogy(1 - sampled, (1 - sampled) / (1 - other))
