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
    """Low-rank adapters that are trained instead of the weights; needs peft.

    Args:
        rank: The rank of each adapter.
        alpha: The scale of the adapters, which are added to the weights times alpha / rank.
        targets: The names of the linear layers that get an adapter; not the output layer, since only its
            weight is read.
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
    """Settings of the update of the policy.

    Weights, gradients and optimiser states are float32, whatever dtype the engine generates in: at the
    learning rate of a pretrained policy, updates of a bfloat16 weight would be rounded away.

    Args:
        backend: `fsdp` shards weights, gradients and optimiser states over the processes that the launcher
            started (FSDP2); `single` keeps all of them in one process.
        launcher: What starts the processes of `fsdp`: `torchrun` around the command, or `ray` from within it,
            as actors of the cluster at `rollout.ray.address`.
        processes: The number of processes that `ray` starts, each with a GPU if the policy runs on one.
        compute_dtype: The dtype in which layers are computed, `float32` or `bfloat16`. Null takes bfloat16 if
            that is `policy.dtype`, so that the learner's log-probabilities are close to the engine's, and
            float32 if it is float32 or float16. Losses and updates are always float32, and with `single` the
            logits are too.
        recompute_activations: Whether to keep only the input of each layer and recompute the layer in the
            backward pass: less memory, a third more work.
        lora: The adapters to train instead of the weights; null trains the weights.
        teacher: The model that a method such as `distill` learns from: a run of yours, or a model as
            `policy.path` names one. It needs the tokenizer, chat template and vocabulary of the policy, is
            sharded under `fsdp`, and is neither trained nor saved.
        teacher_revision: The branch, tag or commit of a teacher on the hub.
        teacher_dtype: The dtype of its weights; null takes `policy.dtype`. In float32 it is computed as the
            policy is, see `compute_dtype`.
        optimizer: `muon` orthogonalises the updates of the hidden matrices and leaves the rest to AdamW; its
            momentum is not sharded under `fsdp`.
        learning_rate: The learning rate of AdamW.
        matrix_learning_rate: The learning rate of Muon, scaled to the size of AdamW's updates; only `muon`
            reads it.
        beta1: The decay of AdamW's mean gradient.
        beta2: The decay of AdamW's mean squared gradient.
        momentum: The momentum of Muon.
        weight_decay: The decay of matrices and embeddings, per step relative to the learning rate; norms and
            biases have none.
        clip_gradient: The largest norm of the gradient, to which a longer one is scaled; null for no limit.
        warmup_steps: The number of optimiser steps over which the learning rate rises to its full value.
        schedule: `constant`, or `cosine`, which falls to a tenth over the whole training.
        epochs: The number of passes over each rollout batch.
        mini_batches: The number of optimiser steps per epoch, over which the trajectories are split.
        micro_batch_tokens: The largest number of tokens in a forward pass; it changes memory and speed, not
            the result. Null takes as many as the free memory holds, if there is a `policy.path`.
        max_skipped_updates: The number of skipped optimiser steps in a row after which the run stops. A step
            is skipped if its loss or gradient is not finite. If a step leaves weights or optimiser states
            that are not finite, the run stops at once, and no checkpoint holds them.
    """

    backend: Literal["single", "fsdp"] = "single"
    launcher: Literal["torchrun", "ray"] = "torchrun"
    processes: Processes | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    recompute_activations: bool = False
    lora: LoraConfig | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
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
    micro_batch_tokens: Tokens | None = 2048
    max_skipped_updates: Count = 5

    def __post_init__(self) -> None:
        check_own_numbers(self)
        mistakes = [f"{name} is {getattr(self, name)}, wanted {wanted}" for name, wanted in self._mistakes()]
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @property
    def updates_per_step(self) -> int:
        """Return the number of optimiser steps per rollout batch."""
        return self.epochs * self.mini_batches

    def resolve_compute_dtype(self, engine_dtype: str) -> "LearnerConfig":
        """Return the configuration with `compute_dtype` set, by the dtype of the engine if it is null."""
        chosen = self.compute_dtype or ("bfloat16" if engine_dtype == "bfloat16" else "float32")
        return replace(self, compute_dtype=chosen)

    def _mistakes(self) -> list[tuple[str, str]]:
        wrong = []
        if (self.launcher == "ray") != (self.processes is not None):
            wrong.append(("processes", "at least 1 with launcher: ray, and null with torchrun"))
        if self.launcher == "ray" and self.backend != "fsdp":
            wrong.append(("launcher", "torchrun, or backend: fsdp"))
        if self.teacher is None:
            wrong += [
                (name, "null without a teacher")
                for name in ("teacher_revision", "teacher_dtype")
                if getattr(self, name) is not None
            ]
        return wrong
