"""The `env` block as a list: several environments to train on, each with its weight.

    env:
      - {id: agentrl/ALFWorld-v0, weight: 2}
      - {id: agentrl/Reasoning-v0, name: sums, kwargs: {level: 1}}

Keys name an environment by its name or by its place: `env.sums.kwargs.level`, `env.1.kwargs.level`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Interval

from agentrl.config import Count, Dotted, build, check_own_numbers
from agentrl.env.settings import EnvConfig
from agentrl.errors import ConfigError
from agentrl.rollout.settings import Placement

_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)
_INDEXED = re.compile(r"env\[(\d+)\]")


@dataclass(frozen=True)
class MixedEnvConfig(EnvConfig):
    """One of several environments to train on.

    Args:
        id: The id of a registered environment.
        split: The split of tasks to train on.
        kwargs: The arguments of the environment.
        name: The name of the environment in keys, task ids, metrics and results; empty takes that in the id,
            `ALFWorld` of `agentrl/ALFWorld-v0`.
        weight: The number of tasks drawn from it, relative to those of the others.
        placement: Where it lives; null takes `rollout.placement`.
        environments_per_worker: The number of environments in each of its worker processes; null takes
            `rollout.workers.environments`.
    """

    id: str = ""
    split: str = "train"
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    weight: Annotated[float, Interval(gt=0, le=1e6)] = 1.0
    placement: Placement | None = None
    environments_per_worker: Count | None = None

    def __post_init__(self) -> None:
        check_own_numbers(self)
        if not self.id:
            raise ConfigError("id is missing")
        if not self.name:
            object.__setattr__(self, "name", short_name(self.id))
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name is {self.name!r}, wanted a letter, then letters, digits, '-' and '_' only"
            )

    @property
    def label(self) -> str:
        """Return how messages call the environment."""
        return self.name

    @property
    def key(self) -> str:
        """Return the key of the environment in a configuration."""
        return f"env.{self.name}"


def short_name(id: str) -> str:
    """Return the name in an environment's id, without its namespace and version.

    >>> short_name("agentrl/ALFWorld-v0")
    'ALFWorld'
    """
    return re.sub(r"-v\d+$", "", id.rpartition("/")[2])


def build_mixture(blocks: Sequence[Any]) -> tuple[MixedEnvConfig, ...]:
    """Build the environments that a configuration lists.

    Raises:
        ConfigError: Blocks are wrong, with the place of each as in `env[1].weight`, or two have one name.
    """
    if not blocks:
        raise ConfigError("env: wrong value (got [], wanted a block, or a list of at least one)")
    made: list[MixedEnvConfig] = []
    mistakes: list[str] = []
    for index, block in enumerate(blocks):
        where = f"env[{index}]"
        if not isinstance(block, Mapping):
            mistakes.append(f"{where}: wrong value (got {block!r}, wanted a block of keys)")
            continue
        try:
            made.append(build(MixedEnvConfig, block, where))
        except ConfigError as error:
            mistakes.append(str(error))
            continue
        if made[-1].name in (other.name for other in made[:-1]):
            mistakes.append(
                f"{where}.name: {made[-1].name} is the name of another environment of the list, wanted one "
                "that differs"
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return tuple(made)


def environment_path(block: Any, path: Dotted) -> Dotted:
    """Return the path of a value in a configuration, given the path by which a user names it.

    An environment of a list is named by its name, or by its index (`env.1` or `env[1]`, from 0). A path that
    leads to no environment is returned unchanged.

    >>> listed = [{"id": "agentrl/ALFWorld-v0"}, {"id": "agentrl/Reasoning-v0", "name": "sums"}]
    >>> environment_path(listed, ("env", "sums", "weight")), environment_path(listed, ("env[0]", "weight"))
    (('env', '1', 'weight'), ('env', '0', 'weight'))
    """
    if not isinstance(block, list) or not path:
        return path
    if found := _INDEXED.fullmatch(path[0]):
        path = ("env", found[1], *path[1:])
    if len(path) < 2:
        return path
    index = next((index for index, each in enumerate(block) if path[1] in (_name_of(each), str(index))), None)
    return path if index is None else ("env", str(index), *path[2:])


def environments_by_index(block: Any) -> Any:
    """Return a list of environments as blocks by their index, and anything else as it is."""
    return {str(index): each for index, each in enumerate(block)} if isinstance(block, list) else block


def unknown_environment(block: Mapping[str, Any], path: Dotted) -> str:
    """Return the message for a path to an environment that is not among the blocks by index."""
    names = ", ".join(f"{index} ({_name_of(each)})" for index, each in block.items())
    return (
        f"{'.'.join(path)}: env is a list of environments, wanted one of {names} after env, as in env.0.id; "
        "env={id: ...} takes one environment instead"
    )


def _name_of(block: Any) -> str | None:
    if not isinstance(block, Mapping):
        return None
    return block.get("name") or short_name(str(block.get("id", "")))
