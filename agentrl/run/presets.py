"""Defaults by the kind of policy: `policy.preset` and the values that suit a pretrained model's size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

from agentrl.config import Dotted, Tree, read_yaml, set_values
from agentrl.errors import AgentRLError
from agentrl.policy.settings import ENDPOINT
from agentrl.run.config_files import leaves

Changes = Sequence[tuple[Dotted, Any]]

PRETRAINED, SCRATCH = "pretrained", "scratch"

# Up to this number of parameters: the learning rates of AdamW for reinforcement learning and for cloning.
# SmolLM2 (0.13B) was measured here, the largest are those of the papers on 1.5B and 7B.
_LEARNING_RATES = (
    (2e8, 3e-5, 1e-4),
    (6e8, 1e-5, 5e-5),
    (1.2e9, 3e-6, 2e-5),
    (float("inf"), 1e-6, 1e-5),
)
_LORA_FACTOR = 10.0  # low-rank adapters start at zero and take higher rates
_TOO_HIGH = 5.0  # the multiple of the preset's learning rate from which on a warning is due
_THINKING_TOKENS = 512


def pretrained_values(
    parameters: int | None,
    *,
    dtype: str = "bfloat16",
    lora: bool = False,
    cloning_lora: bool = False,
    thinks: bool = False,
    clones: bool = False,
) -> dict[Dotted, Any]:
    """Return the values of the preset `pretrained`, by path.

    Args:
        parameters: The number of parameters of the model; None, where it is unknown, takes the rates of the
            largest models, which harm no other.
        dtype: The dtype in which this machine generates fast.
        lora: Whether reinforcement learning trains adapters.
        cloning_lora: Whether cloning trains adapters.
        thinks: Whether a reply reasons before its action.
        clones: Whether data to clone is named, which asks for a warm start.
    """
    rates = _learning_rates(parameters)
    values: dict[Dotted, Any] = {
        ("policy", "dtype"): dtype,
        ("policy", "max_context"): None,
        ("policy", "max_observation_tokens"): None,
        **({} if clones else {("warm_start", "steps"): 0}),
        ("trainer", "threads"): None,
    }
    if thinks:
        values["engine", "max_tokens"] = _THINKING_TOKENS
    for block, rate, adapters in (
        (("learner",), rates[0], lora),
        (("warm_start", "learner"), rates[1], cloning_lora),
    ):
        values |= {
            (*block, "optimizer"): "adamw",
            (*block, "learning_rate"): rate * (_LORA_FACTOR if adapters else 1.0),
            (*block, "warmup_steps"): 5,
            (*block, "micro_batch_tokens"): None,
        }
    return values | {("learner", "schedule"): "constant"}


def endpoint_values(*, thinks: bool = False) -> dict[Dotted, Any]:
    """Return the values of the preset for a model on a chat server, which is neither trained nor constrained.

    Args:
        thinks: Whether a reply reasons before its action.
    """
    values: dict[Dotted, Any] = {
        ("policy", "max_context"): None,
        ("policy", "max_observation_tokens"): None,
        ("rollout", "constrained"): False,
    }
    return values | ({("engine", "max_tokens"): _THINKING_TOKENS} if thinks else {})


def misfits(config: Any, parameters: int | None) -> Iterator[str]:
    """Yield a warning for each value of a run's configuration that does not suit its pretrained model.

    Args:
        config: The configuration of the run.
        parameters: The number of parameters of the model at `policy.path`; None if it is unknown.
    """
    if config.policy.preset != PRETRAINED:
        return
    size = "this model" if parameters is None else f"a model of {in_short(parameters)} parameters"
    stages = [("learner", config.learner)]
    if config.warm_start.steps:
        stages.append(("warm_start.learner", config.warm_start.learner))
    for (name, learner), usual in zip(stages, _learning_rates(parameters), strict=False):
        usual = usual * (_LORA_FACTOR if learner.lora else 1.0)
        if learner.optimizer == "muon":
            yield (
                f"{name}.optimizer is muon, which turns all directions of a pretrained matrix alike and "
                "forgets what they hold; wanted adamw"
            )
        if learner.learning_rate > _TOO_HIGH * usual:
            yield f"{name}.learning_rate is {learner.learning_rate:g}, wanted about {usual:g} for {size}"
        if learner.compute_dtype == "bfloat16" and config.policy.dtype == "float32":
            yield (
                f"{name}.compute_dtype is bfloat16 and policy.dtype float32: the learner's probabilities "
                "will differ from the engine's; wanted the same dtype"
            )
    if config.policy.reply == "think_action" and config.engine.max_tokens < _THINKING_TOKENS // 4:
        yield (
            f"engine.max_tokens is {config.engine.max_tokens}, which ends most thoughts; wanted about "
            f"{_THINKING_TOKENS} for policy.reply=think_action"
        )
    if config.policy.dtype == "float16":
        yield "policy.dtype is float16, whose largest number is 65504; wanted bfloat16 or float32"


def in_short(parameters: int) -> str:
    """Return a number of parameters in words.

    >>> in_short(134_515_008), in_short(1_543_714_304), in_short(172_736)
    ('135M', '1.5B', '0.2M')
    """
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.{0 if parameters >= 1e7 else 1}f}M"


def preset_of(path: str) -> str:
    """Return the preset of a policy: that of the run it came from, else `pretrained`."""
    folder = Path(path)
    for place in (folder, *folder.parents[:2]):  # RUN, RUN/model and RUN/checkpoints/NAME
        if (place / "config.yaml").is_file():
            try:
                policy = read_yaml(place / "config.yaml").get("policy") or {}
            except AgentRLError:
                continue
            older = SCRATCH if policy.get("path") is None else PRETRAINED
            return str(policy.get("preset") or older)
    return PRETRAINED


def _learning_rates(parameters: int | None) -> tuple[float, float]:
    size = float("inf") if parameters is None else parameters
    return next(rates for most, *rates in _LEARNING_RATES if size <= most)  # type: ignore[return-value]


def with_preset(
    tree: Mapping[str, Any], layers: Sequence[Changes], apply: Callable[[Mapping[str, Any], Changes], Tree]
) -> tuple[Tree, str | None]:
    """Apply layers of changes to a configuration, with the preset below the first that names a policy.

    So a preset overrides what was written for a policy from scratch, and whatever is given together with a
    `policy.path`, or later, overrides the preset.

    Args:
        tree: The values of the first file.
        layers: The changes of further files and of the command line, in order.
        apply: Applies changes to a tree.

    Returns:
        The values, and a line that names those that the preset has set, if any.
    """
    final = dict(leaves(reduce(apply, layers, tree)))
    path, preset = final.get(("policy", "path")), final.get(("policy", "preset"))
    if not isinstance(path, str) or preset == SCRATCH:
        return reduce(apply, layers, dict(tree)), None
    if preset is None and preset_of(path) != PRETRAINED:
        return reduce(apply, [*layers, [(("policy", "preset"), SCRATCH)]], dict(tree)), None
    thinks = final.get(("policy", "reply")) == "think_action"
    if path.startswith(ENDPOINT):
        parameters, values = None, endpoint_values(thinks=thinks)
    else:
        parameters = count_parameters(path, final.get(("policy", "revision")))
        values = pretrained_values(
            parameters,
            clones=_has_block(final, "warm_start", "data") or _has_block(final, "warm_start", "from"),
            dtype=fast_dtype(str(final.get(("policy", "device"), "auto"))),
            lora=_has_block(final, "learner", "lora"),
            cloning_lora=_has_block(final, "warm_start", "learner", "lora"),
            thinks=thinks,
        )
    changes = [(("policy", "preset"), PRETRAINED), *values.items()]
    given = dict(leaves(tree))
    if given.get(("policy", "path")) is None:
        so_far = accumulate(layers, apply, initial=dict(tree))
        first = next(k for k, values in enumerate(so_far) if dict(leaves(values)).get(("policy", "path")))
        layers = [*layers[: first - 1], changes, *layers[first - 1 :]]
    else:
        tree = set_values(tree, [change for change in changes if change[0] not in given])
    changed = reduce(apply, layers, dict(tree))
    used = dict(leaves(changed))
    # A layer that gives a whole block, as in policy={path: x}, leaves out the rest of it.
    changed = set_values(changed, [change for change in changes if change[0] not in used])
    used = dict(leaves(changed))
    set_here = [
        f"{'.'.join(key)}={_in_yaml(value)}"
        for key, value in values.items()
        if used[key] == value and (key not in final or final[key] != value)
    ]
    if not set_here:
        return changed, None
    size = "unknown size" if parameters is None else f"{in_short(parameters)} parameters"
    return changed, (
        f"policy.path={path} ({size}): policy.preset=pretrained sets {' '.join(set_here)} "
        "(give any of them, or policy.preset=scratch)"
    )


def count_parameters(path: str, revision: str | None = None) -> int | None:
    """Return the number of parameters of the model at `policy.path`; None if it is not on this machine."""
    from agentrl.policy.model import skeleton
    from agentrl.policy.settings import PolicyConfig

    try:
        model = skeleton(PolicyConfig(path=path, revision=revision))
    except AgentRLError:
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def fast_dtype(device: str) -> str:
    """Return the dtype to generate in: bfloat16, or float32 on a CPU that has no bfloat16 arithmetic."""
    import torch

    from agentrl.policy.precision import has_fast_bfloat16

    on_gpu = device not in ("auto", "cpu") or (device == "auto" and torch.cuda.is_available())
    return "bfloat16" if on_gpu or has_fast_bfloat16() else "float32"


def _has_block(values: Mapping[Dotted, Any], *block: str) -> bool:
    """Return whether there is a value, other than null, in or at a block."""
    return any(key[: len(block)] == block and value is not None for key, value in values.items())


def _in_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
