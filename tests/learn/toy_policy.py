"""A policy small enough to reason about, in double precision, and episodes for it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.learn.forward import Forward

VOCABULARY = 13
WIDTH = 6


class ToyPolicy(nn.Module):
    """The state of a token is a layer over the mean of the embeddings so far: causal, no attention."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.embedding = nn.Embedding(VOCABULARY, WIDTH, _weight=normal(VOCABULARY, WIDTH))
        self.mix = normal(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))


def hidden_states(policy: ToyPolicy, tokens: Tensor, lengths: Tensor) -> Tensor:
    rows = []
    for row in tokens.split(lengths.tolist()):
        steps = torch.arange(1, len(row) + 1, dtype=policy.mix.dtype)[:, None]
        rows.append(torch.tanh(policy.embedding(row).cumsum(0) / steps @ policy.mix) * policy.scale)
    return torch.cat(rows)


def output_weight(policy: ToyPolicy) -> Tensor:
    return policy.embedding.weight


def toy_forward() -> Forward:
    return Forward(hidden_states, output_weight, lambda policy: policy.embedding)


def make_turn(
    draw: random.Random, *, constrained: bool, reward: float = 0.0, new_sequence: bool = False
) -> Turn:
    """Two to four reply tokens; constrained ones have one to four allowed ids."""
    reply = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 4)))
    choices = tuple(
        tuple(sorted({token, *draw.sample(range(VOCABULARY), draw.choice([0, 1, 3]))})) for token in reply
    )
    return Turn(
        "o",
        "a",
        prompt_ids=tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 4))),
        action_ids=reply,
        logprobs=tuple(-draw.random() for _ in reply),
        entropies=tuple(draw.random() for _ in reply),
        allowed=choices if constrained else None,
        reward=reward,
        new_sequence=new_sequence,
    )


def make_groups(seed: int = 0, groups: int = 3, size: int = 4) -> list[Group]:
    """Episodes of one to five turns, constrained or free, some beginning anew; mixed returns."""
    draw = random.Random(seed)
    made = []
    for number in range(groups):
        episodes = []
        for member in range(size):
            count = draw.randint(1, 5)
            turns = tuple(
                make_turn(
                    draw,
                    constrained=draw.random() < 0.7,
                    reward=float(member % 2) if index == count - 1 else 0.0,
                    new_sequence=index == 0 or draw.random() < 0.15,
                )
                for index in range(count)
            )
            id = f"{number}-{member}"
            episodes.append(Episode(id, "toy", f"t{number}", 0, turns, StopReason.TERMINATED, success=True))
        made.append(Group(f"t{number}", tuple(episodes)))
    return made


def answered(groups: Sequence[Group]) -> list[Group]:
    """The groups with answers in their last turns, which some members of a group share."""

    def answer(episode: Episode, member: int) -> Episode:
        *turns, last = episode.turns
        return replace(episode, turns=(*turns, replace(last, action=f"answer {member % 3}")))

    return [
        replace(group, episodes=tuple(answer(each, member) for member, each in enumerate(group.episodes)))
        for group in groups
    ]


def sampled_at(groups: Sequence[Group], *temperatures: float, by_token: bool = False) -> list[Group]:
    """The groups as if their turns, or tokens, had been sampled at these temperatures in turn."""
    drawn = cycle(temperatures)

    def sampled(turn: Turn) -> Turn:
        if not by_token:
            return replace(turn, temperature=next(drawn))
        each = tuple(islice(drawn, len(turn.action_ids)))
        return replace(turn, temperature=each[0], temperatures=each)

    return [
        replace(
            group,
            episodes=tuple(
                replace(episode, turns=tuple(map(sampled, episode.turns))) for episode in group.episodes
            ),
        )
        for group in groups
    ]
