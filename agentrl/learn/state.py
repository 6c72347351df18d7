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

    Attributes:
        updates: The number of times that this object's weights were changed or may have been.
        skipped_updates: The number of optimiser steps that were skipped.
        skipped_in_a_row: The number of those that no step has followed yet.
        parameters: The weights that are trained.
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
        self.updates = 0
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
        """Return everything but the weights of policy and reference: optimisers, counters, value head.

        Under `fsdp` it leaves out the sharded tensors, which `write_shards` writes.
        """
        sharded = self.config.backend == "fsdp"
        head = self.learned.value_head
        return {
            "optimizer": self.config.optimizer,
            "optimizers": [{} if sharded else optimizer.state_dict() for optimizer in self.optimizers],
            "stepped": [bool(optimizer.state) for optimizer in self.optimizers],
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "reference": None if self.reference is None else {},  # empty: it does not change
            "value_head": None if head is None else {} if sharded else head.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a learner of the same policy and configuration.

        Raises:
            CheckpointError: If it does not fit.
        """
        reference = None if self.reference is None else self.reference.policy
        parts = {"reference": reference, "value_head": self.learned.value_head}
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
                    if part is not None and state[name]:
                        part.load_state_dict(state[name])
            self.updates += 1
            self.skipped_updates = int(state["skipped_updates"])
            self.skipped_in_a_row = int(state["skipped_in_a_row"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"learner state: does not fit this policy ({error})") from error

    def write_shards(self, folder: Path) -> None:
        """Write this rank's part of what is learned and of its optimisers; every rank must call it.

        With `lora`, frozen weights are left out.
        """
        # To ask PyTorch for the state of an optimiser that has not stepped would create it.
        stepped = [optimizer for optimizer in self.optimizers if optimizer.state]
        trained = self.config.lora is not None
        write_shards(folder, {"learned": self.learned}, stepped, trained=trained)

    def read_shards(self, folder: Path, state: Mapping[str, Any], *, whole: bool = False) -> None:
        """Restore what any number of ranks wrote, and the `state_dict` that belongs to it.

        Args:
            folder: The folder that `write_shards` wrote.
            state: The `state_dict`.
            whole: Whether frozen weights and the reference are there too, as older versions wrote them.

        Raises:
            CheckpointError: If it does not fit.
        """
        self.load_state_dict(state)
        # An optimiser that had not stepped wrote no state, so there is none to read for it.
        stepped = [optimizer for optimizer, had in zip(self.optimizers, state["stepped"], strict=True) if had]
        modules: dict[str, nn.Module] = {"learned": self.learned}
        if whole and self.reference is not None:
            modules["reference"] = self.reference
        read_shards(folder, modules, stepped, trained=self.config.lora is not None and not whole)

    def write_reference(self, folder: Path) -> None:
        """Write this rank's part of the reference; every rank must call it."""
        write_shards(folder, self._reference_modules(), [])

    def read_reference(self, folder: Path) -> None:
        """Restore the reference that any number of ranks wrote.

        Raises:
            CheckpointError: If it does not fit.
        """
        read_shards(folder, self._reference_modules(), [])

    def _reference_modules(self) -> dict[str, nn.Module]:
        assert self.reference is not None
        return {"reference": self.reference}
