"""The state of a learner: the modules, optimisers and counters that updates change and checkpoints hold."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from agentrl.errors import CheckpointError
from agentrl.learn.ranks import Ranks
from agentrl.learn.settings import LearnerConfig
from agentrl.learn.sharding import ScoringModule, local_tensor, read_shards, write_shards
from agentrl.policy.precision import non_finite


class LearnerState:
    """Modules, optimisers and counters of a learner.

    Args:
        config: The learner's configuration.
        learned: The policy and its value head.
        reference: The reference policy, if there is one.
        optimizers: The optimisers of what is learned.
        ranks: The ranks that learn together.
    """

    def __init__(
        self,
        config: LearnerConfig,
        learned: ScoringModule,
        reference: ScoringModule | None,
        optimizers: list[Optimizer],
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.learned = learned
        self.reference = reference
        self.optimizers = optimizers
        self.ranks = ranks
        self.skipped_updates = 0
        self.skipped_in_a_row = 0
        self.parameters = [value for value in learned.policy.parameters() if value.requires_grad]
        if learned.value_head is not None:
            self.parameters += learned.value_head.parameters()

    def non_finite(self) -> list[str]:
        """Return the names of weights and states that hold nan or inf; every rank must call it."""
        found = self.ranks.gather(non_finite(self.local_tensors()))
        # Ranks that hold parts of the same tensor name it more than once.
        return list(dict.fromkeys(name for names in found for name in names))

    def local_tensors(self, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight and optimiser state that this rank holds, with its name.

        Args:
            trained: Whether to leave out the weights that no optimiser step changes.
        """
        head = self.learned.value_head
        names: dict[Tensor, str] = {value: name for name, value in self.learned.policy.named_parameters()}
        if head is not None:
            names |= {value: f"value_head.{name}" for name, value in head.named_parameters()}
        if self.reference is not None and not trained:
            reference = self.reference.policy.named_parameters()
            names |= {value: f"reference.{name}" for name, value in reference}
        for value, name in names.items():
            if value.requires_grad or not trained:
                yield name, local_tensor(value.detach())
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        yield f"{key} of {names[parameter]}", local_tensor(value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the policy's weights: optimisers, counters, reference and value head.

        Under `fsdp` it leaves out the sharded tensors, which `write_shards` writes.
        """
        sharded = self.config.backend == "fsdp"
        return {
            "optimizer": self.config.optimizer,
            "optimizers": [{} if sharded else optimizer.state_dict() for optimizer in self.optimizers],
            "stepped": [bool(optimizer.state) for optimizer in self.optimizers],
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
        } | {
            name: None if part is None else {} if sharded else part.state_dict()
            for name, part in self._optional_modules().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a learner of the same policy and configuration.

        Raises:
            CheckpointError: If it does not fit.
        """
        parts = self._optional_modules()
        found = (state.get("optimizer"), *(state.get(name) is not None for name in parts))
        wanted = (self.config.optimizer, *(part is not None for part in parts.values()))
        if found != wanted:
            raise CheckpointError(
                f"learner state: (optimizer, has a reference, has a value head) is {found}, wanted {wanted}; "
                "resume with the configuration that the run was started with"
            )
        try:
            if self.config.backend == "single":
                for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(stored)
                # Under fsdp the tensors are in the shards, see `read_shards`.
                for name, part in parts.items():
                    if part is not None:
                        part.load_state_dict(state[name])
            self.skipped_updates = int(state["skipped_updates"])
            self.skipped_in_a_row = int(state["skipped_in_a_row"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"learner state: does not fit this policy ({error})") from error

    def write_shards(self, folder: Path) -> None:
        """Write this rank's part of all modules and optimiser states; every rank must call it."""
        # To ask PyTorch for the state of an optimiser that has not stepped would create it.
        stepped = [optimizer for optimizer in self.optimizers if optimizer.state]
        write_shards(folder, self._sharded_modules(), stepped)

    def read_shards(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Restore what any number of ranks wrote, and the `state_dict` that belongs to it.

        Raises:
            CheckpointError: If it does not fit.
        """
        self.load_state_dict(state)
        # An optimiser that had not stepped wrote no state, so there is none to read for it.
        stepped = [optimizer for optimizer, had in zip(self.optimizers, state["stepped"], strict=True) if had]
        read_shards(folder, self._sharded_modules(), stepped)

    def _optional_modules(self) -> dict[str, nn.Module | None]:
        reference = None if self.reference is None else self.reference.policy
        return {"reference": reference, "value_head": self.learned.value_head}

    def _sharded_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"learned": self.learned}
        return modules if self.reference is None else modules | {"reference": self.reference}
