"""The `learner` block of a run's configuration."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Interval

from agentrl.config import (
    Count,
    Decay,
    PositiveRate,
    PositiveWeight,
    Processes,
    Rate,
    Steps,
    Tokens,
    check_own_numbers,
)
from agentrl.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Matrices of low rank that are learned in place of the weights; needs peft.

    Args:
        rank: of each.
        alpha: they are added to the weights times alpha / rank.
        targets: names of the linear maps that get one; the output layer cannot, for only its weight is read.
    """

    rank: Annotated[int, Interval(ge=1, le=65536)] = 16
    alpha: PositiveWeight = 32.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    def __post_init__(self) -> None:
        check_own_numbers(self)


@dataclass(frozen=True)
class LearnerConfig:
    """How the policy is updated.

    Weights, gradients and optimiser states are float32 whatever the engine generates in: what an update adds
    to a bfloat16 weight at the learning rate of a pretrained policy is rounded away.

    Args:
        backend: `fsdp` deals the weights, gradients and optimiser states out to the processes that torchrun
            started (each a part; FSDP2), `single` has all in one process.
        launcher: who starts the processes of `fsdp`: `torchrun` around the command, or `ray` from within it,
            as actors of the cluster at `rollout.ray.address`.
        processes: that `ray` starts, each with a GPU where the policy computes on one.
        compute_dtype: that layers are computed in, `float32` or `bfloat16`; null takes bfloat16 where
            `policy.dtype` is, so that the learner reads a reply much as the engine wrote it, and float32
            where it is float32 or float16. Losses and updates are float32 in any case, and with `single` so
            are the logits.
        recompute_activations: keep only the input of each layer and compute the layer again on the way back:
            less memory, a third more work.
        lora: learn adapters and leave the weights as they are; null learns the weights.
        optimizer: `muon` orthogonalises the updates of the hidden matrices and leaves the rest to AdamW; its
            momentum is not dealt out under `fsdp`.
        learning_rate: of AdamW.
        matrix_learning_rate: of Muon, scaled to the size of AdamW's updates; only read by `muon`.
        beta1: decay of AdamW's mean gradient.
        beta2: decay of AdamW's mean squared gradient.
        momentum: of Muon.
        weight_decay: of matrices and embeddings, per step relative to the learning rate; norms and biases
            have none.
        clip_gradient: the norm of the gradient is scaled down to this; null for no limit.
        warmup_steps: optimiser steps over which the learning rate rises to its full value.
        schedule: `cosine` falls to a tenth over the whole of training.
        epochs: times that each rollout batch is gone through.
        mini_batches: optimiser steps per epoch; trajectories are dealt out to them.
        micro_batch_tokens: tokens in one forward pass; changes memory and speed, not the result.
        max_skipped_updates: an optimiser step whose loss or gradient is not finite is not applied; after so
            many in a row the run stops. One that leaves weights or optimiser states that are not finite stops
            it at once, and no checkpoint holds them.
    """

    backend: Literal["single", "fsdp"] = "single"
    launcher: Literal["torchrun", "ray"] = "torchrun"
    processes: Processes | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    recompute_activations: bool = False
    lora: LoraConfig | None = None
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: PositiveRate = 1e-3
    matrix_learning_rate: PositiveRate = 4e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    momentum: Decay = 0.95
    weight_decay: Rate = 0.0
    clip_gradient: PositiveRate | None = 1.0
    warmup_steps: Steps = 5
    schedule: Literal["constant", "cosine"] = "cosine"
    epochs: Count = 1
    mini_batches: Count = 1
    micro_batch_tokens: Tokens = 2048
    max_skipped_updates: Count = 5

    def __post_init__(self) -> None:
        check_own_numbers(self)
        mistakes = [f"{name} is {getattr(self, name)}, wanted {wish}" for name, wish in self._mistakes()]
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps per rollout batch."""
        return self.epochs * self.mini_batches

    def resolve_compute_dtype(self, engine_dtype: str) -> "LearnerConfig":
        """Return this with a `compute_dtype`, beside an engine that generates in a dtype."""
        chosen = self.compute_dtype or ("bfloat16" if engine_dtype == "bfloat16" else "float32")
        return replace(self, compute_dtype=chosen)

    def _mistakes(self) -> list[tuple[str, str]]:
        wrong = []
        if (self.launcher == "ray") != (self.processes is not None):
            wrong.append(("processes", "at least 1 with launcher: ray, and null with torchrun"))
        if self.launcher == "ray" and self.backend != "fsdp":
            wrong.append(("launcher", "torchrun, or backend: fsdp"))
        return wrong
