"""A divergence penalty whose strength follows the measured divergence, for each class of episodes apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires
from agentrl.data.batch import Batch
from agentrl.errors import CheckpointError

DECAY = 0.97  # of the moving averages, per step
DEAD_ZONE, LARGEST, RATE = 0.02, 0.2, 0.05  # of the relative error, and of the change of log beta by it
LOWEST, HIGHEST = math.log(1e-4), math.log(1e2)


class AdaptiveKL:
    """Factors beta of a divergence penalty, one for each class, that lead the divergence to a target.

        e = moving average of (moving average of KL / target - 1)
        log beta += 0.05 clip(e, -0.2, 0.2)   where |e| > 0.02;   beta within [1e-4, 1e2]

    Args:
        name: The key of the state.
        classes: The names of the classes.
        classify: (batch) -> the index of each episode's class.
        target: The wanted divergence from the reference, in nats.

    Source: Chen et al. 2025, arXiv:2510.08457 (ARES, its released code).
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        classify: Callable[[Batch], Sequence[int]],
        target: float = 0.01,
    ) -> None:
        self.name = name
        self._classes, self._classify, self._target = tuple(classes), classify, target
        self._kl: dict[str, float] = {}
        self._error = dict.fromkeys(self._classes, 0.0)
        self._log_beta = dict.fromkeys(self._classes, 0.0)

    def weights(self, mini: MiniBatch, context: Context) -> Tensor:
        """Return beta of each token's class; [B, T] float64."""
        found = [math.exp(self._log_beta[self._classes[index]]) for index in self._classify(mini.batch)]
        betas = torch.tensor(found, dtype=torch.float64, device=mini.advantages.device)
        return functional.broadcast_to_tokens(betas, mini.batch.trajectory, mini.batch.action_mask)

    @requires("old_logprobs", "reference")
    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Move each beta by the divergence of its class before the update."""
        batch = rollout.batch
        old = require_tensor(batch.old_logprobs, "old_logprobs").double()
        gaps = functional.kl_k3(old, require_tensor(batch.reference_logprobs, "reference_logprobs").double())
        classes = torch.tensor(self._classify(batch), dtype=torch.int64, device=gaps.device)
        for index, name in enumerate(self._classes):
            mask = batch.action_mask & (classes == index)[batch.trajectory][:, None]
            if bool(mask.any()):
                self._move(name, float(functional.masked_mean(gaps, mask)))

    def _move(self, name: str, divergence: float) -> None:
        smooth = DECAY * self._kl.get(name, divergence) + (1 - DECAY) * divergence
        error = DECAY * self._error[name] + (1 - DECAY) * (smooth / self._target - 1)
        self._kl[name], self._error[name] = smooth, error
        if abs(error) > DEAD_ZONE:
            moved = self._log_beta[name] + RATE * min(max(error, -LARGEST), LARGEST)
            self._log_beta[name] = min(max(moved, LOWEST), HIGHEST)

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return beta of each class."""
        return {f"{self.name}/beta/{name}": math.exp(value) for name, value in self._log_beta.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages and the logarithms of beta."""
        return {"kl": dict(self._kl), "error": dict(self._error), "log_beta": dict(self._log_beta)}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore them."""
        if set(state) != {"kl", "error", "log_beta"} or set(state["log_beta"]) != set(self._classes):
            raise CheckpointError(
                f"the state of {self.name} holds {sorted(state)}, wanted kl, error and log_beta of "
                f"{', '.join(self._classes)}"
            )
        self._kl, self._error, self._log_beta = (dict(state[key]) for key in ("kl", "error", "log_beta"))
