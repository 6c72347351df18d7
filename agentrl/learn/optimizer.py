"""Optimisers over a policy's parameters, and their learning rate as a function of the step."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from agentrl.learn.settings import LearnerConfig
from agentrl.learn.sharding import replicate_gradients
from agentrl.schedule import cosine, warmup

_FULL_RATE = "full_rate"  # a parameter group's learning rate before warm-up and decay


def build_optimizers(
    policy: nn.Module, config: LearnerConfig, value_head: nn.Module | None = None
) -> list[Optimizer]:
    """Build AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest.

    Embeddings and the output layer are tables of rows, not maps between directions, so AdamW updates them. It
    also updates every parameter that does not have exactly two dimensions.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    hidden = {id(matrix) for matrix in _hidden_matrices(policy)} if config.optimizer == "muon" else set()
    matrices = [parameter for parameter in trained if id(parameter) in hidden]
    rest = [parameter for parameter in trained if id(parameter) not in hidden]
    optimizers: list[Optimizer] = [_adamw(rest, config)] if rest else []
    if matrices:
        muon = Muon(
            matrices,
            lr=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        replicate_gradients(muon)
        optimizers.append(muon)
    if value_head is not None:
        optimizers.append(_adamw(list(value_head.parameters()), config))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group[_FULL_RATE] = group["lr"]
    return optimizers


def rate_factor(config: LearnerConfig, index: int, total: int) -> float:
    """Return the factor of the learning rates at optimiser step `index` of `total`."""
    decay = cosine(index, total) if config.schedule == "cosine" else 1.0
    return warmup(index, config.warmup_steps) * decay


def set_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` times its full rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[_FULL_RATE] * factor


def _adamw(parameters: list[nn.Parameter], config: LearnerConfig) -> Optimizer:
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    plain = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )


def _hidden_matrices(policy: nn.Module) -> list[Tensor]:
    tables = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    find_head = getattr(policy, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if head is not None:
        tables.add(id(head.weight))
    return [value for value in policy.parameters() if value.dim() == 2 and id(value) not in tables]
