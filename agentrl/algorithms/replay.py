"""Replay buffer of trajectories with positive advantages, whose advantages are recomputed when sampled."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentrl.algorithms.algorithm import EQUAL_RETURNS, ReplayBatch, ReplayLoss
from agentrl.algorithms.hooks import Coefficient, Context, MiniBatch, require_tensor
from agentrl.data.batch import AllowedIds, Batch
from agentrl.data.trajectory import Episode, StopReason
from agentrl.errors import CheckpointError
from agentrl.seeds import derive_seed

RELEASED_TOLERANCE = 10  # steps, the limit of the released code

RecomputeAdvantage = Callable[[Tensor, float, float], Tensor]
_PER_DECISION = ("logprobs", "entropies", "old_logprobs", "old_entropies")
_EXTRA = "extras/"  # before the names of token statistics among a row's tensors
_STORED_NAMES = {
    "episode_return": "earned",
    "action_mask": "sampled",
}  # fields of a row that have another name in checkpoints


@dataclass(frozen=True)
class _Row:
    """Row of an earlier step's batch. Only action tokens with a positive advantage count as sampled."""

    episode: str
    env: str
    task: str
    step: int
    episode_return: float  # shaped return of its trajectory in that step
    tokens: dict[str, Tensor]  # [T] each: advantages, token fields of a batch, and extras, [T] or [T, k]
    allowed: tuple[Tensor, Tensor] | None  # positions [M], ids [M, K]

    @property
    def key(self) -> tuple[str, int, int]:
        """Return a unique key: no two rows of an episode have the same first action token."""
        return self.episode, self.step, int(self.tokens["turns"][self.tokens["action_mask"]][0])


class ReplayBuffer:
    """Replay buffer that keeps rows with positive advantages and samples some once enough of them are good.

    A row is kept if one of its action tokens in the loss has a positive advantage; its other action tokens no
    longer count. The baseline is the median of recent groups' mean returns. Once more than 1.5 * `size` rows
    have a return above the baseline, rows are sampled uniformly from those whose advantage by
    `recompute_advantage` is still positive. Their number is the largest power of two available, at most
    `size`. So `size` limits the sample, and `tolerance` limits how long rows are kept.

    If rows are sampled for optimiser steps of their own, the buffer is emptied and filled anew. If they are
    mixed into the steps of the rollout batch, rows leave the buffer only by age.

    Args:
        algorithm: The function that returns the algorithm of sampled rows, see `ReplayBatch`.
        size: The maximum sample, in rows.
        baselines: The number of latest mean returns in the median.
        tolerance: The maximum age of a sampled row, in steps.
        coefficient: The factor of the loss of sampled rows, as a function of the context; at 0 nothing is
            sampled.
        recompute_advantage: (advantages [T], return, baseline) -> current advantages [T].
        episode_filter: Says which episodes are kept at all; None keeps all.
        mixed: See `ReplayBatch`.
        released: Follow the released code: advantages of 0 also qualify; rows expire after sampling, by their
            distance from the newest row, so that ages reach `tolerance` + 2, but `tolerance` is at most
            RELEASED_TOLERANCE; baselines are dropped by whole steps, but never those of the newest step.
        count_all: Count every row as good enough, whatever its return.
    """

    name = "replay"

    def __init__(
        self,
        algorithm: ReplayLoss,
        *,
        size: int,
        baselines: int,
        tolerance: int,
        coefficient: Coefficient,
        recompute_advantage: RecomputeAdvantage,
        episode_filter: Callable[[Episode], bool] | None = None,
        mixed: bool = False,
        released: bool = False,
        count_all: bool = False,
    ) -> None:
        self._algorithm, self._coefficient, self._recompute_advantage = (
            algorithm,
            coefficient,
            recompute_advantage,
        )
        self._size, self._most_baselines = size, baselines
        self._tolerance = min(tolerance, RELEASED_TOLERANCE) if released else tolerance
        self._episode_filter, self._mixed = episode_filter, mixed
        self._released, self._count_all = released, count_all
        self._rows: list[_Row] = []
        self._baselines: deque[list[float]] = deque()  # by step
        self._policy: tuple[str, int] | None = None  # tokenizer and vocabulary, once known
        self._metrics: dict[str, float] = {}
        self._kept = 0.0

    def sample(self, context: Context) -> ReplayBatch | None:
        """Return the rows to train on again in this step, or None if there are not enough."""
        if not self._released:
            self._expire(context.step)
        coefficient = self._coefficient(context)
        baseline = median([mean for means in self._baselines for mean in means] or (0.0,))
        usable = sum(self._count_all or row.episode_return - baseline > EQUAL_RETURNS for row in self._rows)
        self._metrics = {
            "coefficient": coefficient,
            "baseline": baseline,
            "usable": float(usable),
            "recalled": 0.0,
        }
        if coefficient <= 0 or usable <= 1.5 * self._size:
            return None
        recomputed = [
            self._recompute_advantage(row.tokens["advantages"], row.episode_return, baseline)
            for row in self._rows
        ]
        good = [index for index, row in enumerate(self._rows) if self._good(recomputed[index], row)]
        chosen = self._draw(good, context)
        self._metrics["rejected_share"] = 1 - len(good) / len(self._rows)
        if not chosen:
            return None
        rows = [self._rows[index] for index in chosen]
        ages = [context.step - row.step for row in rows]
        self._metrics |= {
            "recalled": float(len(rows)),
            "age_mean": sum(ages) / len(ages),
            "age_max": float(max(ages)),
        }
        advantages = [torch.where(self._rows[i].tokens["action_mask"], recomputed[i], 0.0) for i in chosen]
        if not self._mixed:
            self._rows = []
        return ReplayBatch(
            _batch(rows),
            pad_sequence(advantages, batch_first=True),
            self._algorithm,
            coefficient,
            self._mixed,
        )

    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Keep the rows with positive advantages and the mean returns of the groups."""
        if self._released and self._rows:
            self._expire(self._rows[-1].step)
        self._policy = context.tokenizer, context.vocabulary
        batch = rollout.batch
        good = rollout.counted & (rollout.advantages > 0)
        moved = MiniBatch(batch.to("cpu"), rollout.advantages.cpu())
        found = [
            _row(moved.select(row), good[row].cpu(), context.step)
            for row in good.any(dim=1).nonzero().cpu()
            if self._episode_filter is None
            or self._episode_filter(batch.episodes[int(batch.trajectory[row])])
        ]
        self._rows += found
        self._kept = len(found) / max(1, len(batch.lengths))
        groups = batch.groups.unique()  # type: ignore[no-untyped-call]
        self._remember([float(batch.returns[batch.groups == group].mean()) for group in groups])

    def metrics(self) -> Mapping[str, float]:
        """Return the size, the rows kept and sampled, the baseline in reward units and the ages in steps."""
        return {"size": float(len(self._rows)), "kept_share": self._kept, **self._metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, the baselines, and the tokenizer under which the tokens are valid."""
        return {
            "policy": self._policy,
            "rows": [_stored(row) for row in self._rows],
            "baselines": [mean for means in self._baselines for mean in means],
            "baseline_steps": [len(means) for means in self._baselines],
        }

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore a state.

        Raises:
            CheckpointError: If the state is malformed or belongs to another tokenizer or vocabulary.
        """
        try:
            policy, rows, baselines = state["policy"], state["rows"], state["baselines"]
            if policy is not None and tuple(policy) != (context.tokenizer, context.vocabulary):
                raise CheckpointError(
                    f"replay: (tokenizer, vocabulary) is {tuple(policy)}, wanted this policy's "
                    f"{(context.tokenizer, context.vocabulary)}: its token ids mean something else here"
                )
            self._rows = [_loaded(row) for row in rows]
            means = iter(map(float, baselines))
            counts = state.get("baseline_steps", [1] * len(baselines))  # older states lack the steps
            self._baselines = deque(list(islice(means, count)) for count in counts)
            self._policy = policy
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"replay: not the state of a replay buffer ({error!r})") from error

    def _remember(self, means: list[float]) -> None:
        """Add a step's baselines and drop the oldest ones beyond the limit."""
        if means:
            self._baselines.append(means)
        while (excess := sum(map(len, self._baselines)) - self._most_baselines) > 0:
            if not self._released:
                del self._baselines[0][:excess]
            elif len(self._baselines) == 1:
                return
            if self._released or not self._baselines[0]:
                self._baselines.popleft()

    def _expire(self, step: int) -> None:
        self._rows = [row for row in self._rows if step - row.step <= self._tolerance]

    def _good(self, advantages: Tensor, row: _Row) -> bool:
        values = advantages[row.tokens["action_mask"]]
        return bool((values >= 0).all() if self._released else (values > 0).all())

    def _draw(self, good: Sequence[int], context: Context) -> Sequence[int]:
        if not good:
            return []
        count = min(1 << (len(good).bit_length() - 1), self._size)

        def draw(index: int) -> int:
            return derive_seed("replay", context.seed, context.step, *self._rows[index].key)

        return sorted(sorted(good, key=draw)[:count])


def _stored(row: _Row) -> dict[str, Any]:
    """Return the fields of a row under the names that checkpoints use."""
    values = _rename(vars(row), _STORED_NAMES)
    return values | {"tokens": _rename(values["tokens"], _STORED_NAMES)}


def _loaded(values: Mapping[str, Any]) -> _Row:
    """Make a row from the fields that `_stored` returned."""
    names = {stored: name for name, stored in _STORED_NAMES.items()}
    return _Row(**_rename(values, names) | {"tokens": _rename(values["tokens"], names)})


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def _row(mini: MiniBatch, good: Tensor, step: int) -> _Row:
    """Make a row from a mini-batch of one row; `good` [1, T] marks the action tokens that count."""
    batch = mini.batch
    good = good[0, : batch.tokens.shape[1]].clone()  # a view would keep the whole batch in memory
    values = {name: require_tensor(getattr(batch, name), name)[0] for name in _PER_DECISION}
    extras = {_EXTRA + name: value[0] for name, value in batch.extras.items()}
    drawn = torch.ones_like(values["logprobs"]) if batch.temperatures is None else batch.temperatures[0]
    allowed = None
    if batch.allowed is not None:
        kept = good[batch.allowed.positions]
        allowed = batch.allowed.positions[kept], batch.allowed.ids[kept]
    episode = batch.episodes[int(batch.trajectory)]
    return _Row(
        episode=episode.id,
        env=episode.env,
        task=episode.task,
        step=step,
        episode_return=float(batch.returns[batch.trajectory]),
        tokens={
            "tokens": batch.tokens[0],
            "turns": batch.turns[0],
            "action_mask": good,
            "temperatures": torch.where(good, drawn.double(), 1.0),
        }
        | {
            name: torch.where(good, value, 0.0)
            for name, value in (values | {"advantages": mini.advantages[0]}).items()
        }
        | {
            name: torch.where(good.view(-1, *[1] * (value.dim() - 1)), value, 0.0)
            for name, value in extras.items()
        },
        allowed=allowed,
    )


def _batch(rows: Sequence[_Row]) -> Batch:
    """Collate rows. Rows of one episode and step form one trajectory, of which only the return is known."""
    owners: dict[tuple[str, int], int] = {}
    trajectory = [owners.setdefault((row.episode, row.step), len(owners)) for row in rows]
    of = dict(zip(trajectory, rows, strict=True))
    fills = {"tokens": 0, "turns": -1, "action_mask": False} | dict.fromkeys(_PER_DECISION, 0.0)
    padded: dict[str, Any] = {
        name: pad_sequence([row.tokens[name] for row in rows], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }
    # Rows that a run stored before its algorithm required a statistic lack it.
    shared = set[str].intersection(*(set(row.tokens) for row in rows))
    extras = {
        name.removeprefix(_EXTRA): pad_sequence([row.tokens[name] for row in rows], batch_first=True)
        for name in sorted(shared)
        if name.startswith(_EXTRA)
    }
    # Rows of older versions lack their temperatures.
    drawn = [row.tokens.get("temperatures", torch.ones(len(row.tokens["tokens"])).double()) for row in rows]
    temperatures = pad_sequence(drawn, batch_first=True, padding_value=1.0)
    return Batch(
        lengths=torch.tensor([len(row.tokens["tokens"]) for row in rows]),
        rewards=torch.zeros_like(padded["logprobs"]),
        trajectory=torch.tensor(trajectory),
        returns=torch.tensor([of[owner].episode_return for owner in range(len(of))], dtype=torch.float64),
        groups=torch.arange(len(of)),
        episodes=tuple(_episode(of[owner]) for owner in range(len(of))),
        allowed=_allowed(rows),
        temperatures=temperatures,
        extras=extras,
        **padded,
    )


def _episode(row: _Row) -> Episode:
    # The id includes the step, because two steps may have episodes of the same name.
    return Episode(f"{row.episode}@{row.step}", row.env, row.task, 0, (), StopReason.TERMINATED)


def _allowed(rows: Sequence[_Row]) -> AllowedIds | None:
    parts = [(index, *row.allowed) for index, row in enumerate(rows) if row.allowed is not None]
    ids = [choice for _, _, choices in parts for choice in choices]
    if not ids:
        return None
    return AllowedIds(
        rows=torch.cat([torch.full_like(positions, index) for index, positions, _ in parts]),
        positions=torch.cat([positions for _, positions, _ in parts]),
        ids=pad_sequence(ids, batch_first=True, padding_value=-1),
    )
