"""Episodes as tensors. Index t always refers to token t: its log-probability, entropy, reward and mask."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from agentrl.data.trajectory import BranchPoint, Episode, Group, Turn

Layout = Literal["trajectory", "turn"]


@dataclass(frozen=True)
class AllowedIds:
    """The choices at constrained decisions: token (rows[m], positions[m]) was sampled from ids[m]."""

    rows: Tensor  # [M] int64
    positions: Tensor  # [M] int64
    ids: Tensor  # [M, K] int64, padded with -1


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of tokens with per-token data.

    A row is a sequence that the policy saw: a trajectory, a part of one if its dialogue was restarted, or one
    turn with its history, depending on the `layout` of `collate`. B is the number of rows, T the width and E
    the number of trajectories. A trajectory without rows still has a return, which enters the baseline of its
    group.

    Example: a trajectory [5, 9 | 7, 3] in which 7 was a decision and 3 was forced has lengths [4],
    sampled [[F, F, T, F]], turns [[-1, -1, 0, 0]] and trajectory [0].
    """

    tokens: Tensor  # [B, T] int64
    lengths: Tensor  # [B] int64
    action_mask: Tensor  # [B, T] bool, decisions of the policy: the only tokens that contribute to the loss
    logprobs: Tensor  # [B, T] float32, nats under the sampling distribution, 0 where not sampled
    entropies: Tensor  # [B, T] float32, nats, likewise
    rewards: Tensor  # [B, T] float32, reward of each turn at its last reply token
    turns: Tensor  # [B, T] int64, index of the turn at its reply tokens, else -1
    trajectory: Tensor  # [B] int64, index into `episodes`
    returns: Tensor  # [E] float64, sum of the rewards of each trajectory
    groups: Tensor  # [E] int64, equal for trajectories of one task
    episodes: tuple[Episode, ...] = field(repr=False)  # E
    allowed: AllowedIds | None = None
    # [E] int64, the index of each trajectory in its group, where aborted ones count too; None: not known.
    members: Tensor | None = None
    # [B, T] float64, the temperature at which a token is scored, 1 where not sampled; None: 1 everywhere. It
    # is the one at which the token was sampled, except in a second rollout.
    temperatures: Tensor | None = None
    old_logprobs: Tensor | None = None  # [B, T] float32, by the learner before its first update
    old_entropies: Tensor | None = None  # [B, T] float32
    reference_logprobs: Tensor | None = None  # [B, T] float32, under the reference policy
    teacher_logprobs: Tensor | None = None  # [B, T] float32, under the teacher
    reward_logprobs: Tensor | None = None  # [B, T] float32, under the algorithm's reward model
    values: Tensor | None = None  # [B, T] float32, expected return before a sampled token
    targets: Tensor | None = None  # [B, T] float32, regression targets of `values`
    last_values: Tensor | None = None  # [E] float32, expected return after the last token of a trajectory
    # [B, T] or [B, T, k] by name, statistics of the scoring pass, 0 where not sampled; see `token_statistic`.
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    # [E, ...] or a single number by name, features of the rollout batch; see `algorithms.named_features`.
    features: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = True  # False of rows that were selected, from which features cannot be computed
    # Branch points of aborted episodes by (group, id), since episodes of this batch may descend from them.
    aborted: Mapping[tuple[int, str], BranchPoint | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape
        by_row = dict.fromkeys(("lengths", "trajectory"), (rows,))
        by_episode = dict.fromkeys(("returns", "groups", "members", "last_values"), (len(self.episodes),))
        by_token = dict.fromkeys(_PER_TOKEN, (rows, width))
        for name, wanted in {**by_row, **by_episode, **by_token}.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != wanted:
                raise ValueError(f"Batch.{name} has shape {tuple(value.shape)}, wanted {wanted}")
        for name, value in self.extras.items():
            if tuple(value.shape[:2]) != (rows, width):
                raise ValueError(
                    f"Batch.extras[{name!r}] has shape {tuple(value.shape)}, wanted [{rows}, {width}, ...]"
                )
        if width and bool(self.action_mask[:, 0].any()):
            raise ValueError("Batch.sampled is set at position 0, wanted a prompt before the first decision")

    @property
    def group(self) -> Tensor:
        """Return the group of each row, [B] int64."""
        return self.groups[self.trajectory]

    def select(self, rows: Tensor | Sequence[int]) -> "Batch":
        """Return the given distinct rows in that order, cropped to the longest of them.

        Args:
            rows: The indices of the rows, [N].
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.tokens.device)
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(index) else 0
        per_token = {
            name: value[index, :width] for name in _PER_TOKEN if (value := getattr(self, name)) is not None
        }
        return replace(
            self,
            lengths=lengths,
            trajectory=self.trajectory[index],
            allowed=None if self.allowed is None else _select_allowed(self.allowed, index, len(self.tokens)),
            extras={name: value[index, :width] for name, value in self.extras.items()},
            whole=False,
            **per_token,
        )

    def with_rewards(self, rewards: Tensor) -> "Batch":
        """Return the batch with other rewards of its turns, also in its episodes and returns.

        Args:
            rewards: [E, K] float, the reward of each turn; what is beyond the last turn does not count.
        """
        following = torch.nn.functional.pad(self.turns[:, 1:], (0, 1), value=-1)
        ends = (self.turns >= 0) & (self.turns != following)
        own = rewards.to(self.tokens.device)[self.trajectory].gather(1, self.turns.clamp(min=0))
        episodes = tuple(
            replace(
                episode,
                turns=tuple(
                    replace(turn, reward=reward)
                    for turn, reward in zip(episode.turns, row, strict=False)  # rows are padded
                ),
            )
            for episode, row in zip(self.episodes, rewards.tolist(), strict=True)
        )
        returns = [episode.episode_return for episode in episodes]
        return replace(
            self,
            rewards=torch.where(ends, own, 0.0).to(self.rewards.dtype),
            returns=torch.tensor(returns, dtype=self.returns.dtype, device=self.returns.device),
            episodes=episodes,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with all tensors on `device`."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        for item in ("extras", "features"):
            moved[item] = {name: value.to(device) for name, value in getattr(self, item).items()}
        if self.allowed is not None:
            choices = self.allowed
            moved["allowed"] = AllowedIds(
                choices.rows.to(device), choices.positions.to(device), choices.ids.to(device)
            )
        return replace(self, **moved)


_PER_TOKEN = (
    "tokens",
    "action_mask",
    "logprobs",
    "entropies",
    "rewards",
    "turns",
    "temperatures",
    "old_logprobs",
    "old_entropies",
    "reference_logprobs",
    "teacher_logprobs",
    "reward_logprobs",
    "values",
    "targets",
)


def collate(groups: Sequence[Group], *, layout: Layout = "trajectory") -> Batch:
    """Collate finished episodes into one batch, keeping only the branch points of aborted ones.

    Args:
        groups: The groups of episodes whose returns are compared.
        layout: "trajectory" merges turns into one row while prompts extend it (a `new_sequence` turn begins a
            new row); "turn" gives every turn its own row, with everything before it as context.

    Raises:
        ValueError: A reply has no tokens, or a token outside its allowed ids; the message names episode and
            turn.
    """
    episodes: list[Episode] = []
    group_ids: list[int] = []
    members: list[int] = []
    rows: list[_Row] = []
    for number, group in enumerate(groups):
        for member, episode in enumerate(group.episodes):
            if episode.stop.aborted:
                continue
            rows.extend(_rows(episode, len(episodes), layout))
            episodes.append(episode)
            group_ids.append(number)
            members.append(member)
    lengths = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64)
    return Batch(
        tokens=_pad([row.tokens for row in rows], lengths, torch.int64),
        lengths=lengths,
        action_mask=_pad([row.action_mask for row in rows], lengths, torch.bool),
        logprobs=_pad([row.logprobs for row in rows], lengths, torch.float32),
        entropies=_pad([row.entropies for row in rows], lengths, torch.float32),
        rewards=_pad([row.rewards for row in rows], lengths, torch.float32),
        turns=_pad([row.turns for row in rows], lengths, torch.int64, fill=-1),
        trajectory=torch.tensor([row.trajectory for row in rows], dtype=torch.int64),
        returns=torch.tensor([episode.episode_return for episode in episodes], dtype=torch.float64),
        groups=torch.tensor(group_ids, dtype=torch.int64),
        members=torch.tensor(members, dtype=torch.int64),
        episodes=tuple(episodes),
        allowed=_gather_allowed(rows),
        temperatures=_gather_temperatures(rows, lengths),
        aborted={
            (number, episode.id): episode.parent
            for number, group in enumerate(groups)
            for episode in group.episodes
            if episode.stop.aborted
        },
    )


def scored_at(batch: Batch, chosen: Tensor, temperature: float) -> Batch:
    """Return the batch with the action tokens of some trajectories scored at another temperature.

    Args:
        batch: The batch.
        chosen: [E] bool, the trajectories.
        temperature: The temperature, above 0.
    """
    known = batch.temperatures
    if known is None:
        known = torch.ones(batch.tokens.shape, dtype=torch.float64, device=batch.tokens.device)
    changed = batch.action_mask & chosen[batch.trajectory][:, None]
    values = torch.where(changed, temperature, known)
    return replace(batch, temperatures=None if bool((values == 1.0).all()) else values)


@dataclass(slots=True)
class _Row:
    """One row of a batch under construction."""

    trajectory: int
    tokens: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    allowed: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # (position, ids)

    def add_context(self, ids: Sequence[int]) -> None:
        """Append tokens that the policy did not generate."""
        count = len(ids)
        self.tokens.extend(ids)
        self.action_mask.extend([False] * count)
        for values in (self.logprobs, self.entropies, self.rewards):
            values.extend([0.0] * count)
        self.turns.extend([-1] * count)
        self.temperatures.extend([1.0] * count)

    def add_reply(self, turn: Turn, index: int) -> None:
        """Append the tokens of a reply."""
        start, count, decided = len(self.tokens), len(turn.action_ids), turn.action_mask
        self.tokens.extend(turn.action_ids)
        self.action_mask.extend(decided)
        self.logprobs.extend(_at_decisions(turn.logprobs, decided))
        self.entropies.extend(_at_decisions(turn.entropies, decided))
        self.rewards.extend([0.0] * (count - 1) + [turn.reward])
        self.turns.extend([index] * count)
        self.temperatures.extend(_temperatures(turn))
        for position, ids in enumerate(turn.allowed or ()):
            if ids is not None and decided[position]:
                self.allowed.append((start + position, ids))


def _rows(episode: Episode, trajectory: int, layout: Layout) -> Iterator[_Row]:
    """Yield the rows of an episode in the given layout."""
    row = _Row(trajectory)
    history: list[int] = []
    for index, turn in enumerate(episode.turns):
        _check(episode, index, turn)
        if turn.new_sequence:
            history = []
        # In the layout "trajectory", a row continues as long as prompts extend it.
        if layout == "turn" or turn.new_sequence:
            if row.tokens:
                yield row
            row = _Row(trajectory)
            row.add_context(history)
        row.add_context(turn.prompt_ids)
        row.add_reply(turn, index)
        if layout == "turn":
            history += [*turn.prompt_ids, *turn.action_ids]
    if row.tokens:
        yield row


def _check(episode: Episode, index: int, turn: Turn) -> None:
    """Refuse a turn without reply tokens, or whose per-token data do not fit them."""
    place = f"episode {episode.id!r}, turn {index}"
    if not turn.action_ids:
        raise ValueError(f"{place}: the reply has no tokens, wanted an episode of a policy with a tokenizer")
    for name in ("logprobs", "entropies", "allowed", "temperatures"):
        values = getattr(turn, name)
        if values and len(values) != len(turn.action_ids):
            raise ValueError(f"{place}: {len(values)} {name} for {len(turn.action_ids)} reply tokens")
    for token, ids in zip(turn.action_ids, turn.allowed or (), strict=False):
        if ids is not None and token not in ids:
            raise ValueError(f"{place}: token {token} is not among the allowed {ids[:8]}")


def _at_decisions(values: Sequence[float], decided: Sequence[bool]) -> list[float]:
    if not values:
        return [0.0] * len(decided)
    return [value if kept else 0.0 for value, kept in zip(values, decided, strict=True)]


def _temperatures(turn: Turn) -> list[float]:
    """Return the temperature that the logprob of each reply token refers to; 1 where not sampled."""
    used = turn.temperatures or (turn.temperature,) * len(turn.action_ids)
    return [
        value if value and decided else 1.0  # a greedy token has the logprob of temperature 1
        for value, decided in zip(used, turn.action_mask, strict=True)
    ]


def _pad(rows: Sequence[Sequence[Any]], lengths: Tensor, dtype: torch.dtype, fill: int = 0) -> Tensor:
    width = int(lengths.max()) if len(rows) else 0
    padded = torch.full((len(rows), width), fill, dtype=dtype)
    filled = torch.arange(width) < lengths[:, None]
    padded[filled] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return padded


def _gather_temperatures(rows: Sequence[_Row], lengths: Tensor) -> Tensor | None:
    if all(value == 1.0 for row in rows for value in row.temperatures):
        return None
    return _pad([row.temperatures for row in rows], lengths, torch.float64, fill=1)


def _gather_allowed(rows: Sequence[_Row]) -> AllowedIds | None:
    """Collect the allowed ids of all rows, padded to the largest choice."""
    entries = [(row, position, ids) for row, item in enumerate(rows) for position, ids in item.allowed]
    if not entries:
        return None
    counts = torch.tensor([len(ids) for _, _, ids in entries])
    return AllowedIds(
        rows=torch.tensor([row for row, _, _ in entries]),
        positions=torch.tensor([position for _, position, _ in entries]),
        ids=_pad([ids for _, _, ids in entries], counts, torch.int64, fill=-1),
    )


def _select_allowed(allowed: AllowedIds, index: Tensor, rows: int) -> AllowedIds | None:
    """Return the entries of the rows `index`, renumbered, or None if there are none."""
    place = torch.full((rows,), -1, dtype=torch.int64, device=index.device)
    place[index] = torch.arange(len(index), device=index.device)
    kept = place[allowed.rows] >= 0
    if not bool(kept.any()):
        return None
    return AllowedIds(place[allowed.rows[kept]], allowed.positions[kept], allowed.ids[kept])
