"""A tiny environment, and players and engines that count their requests."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium

from agentrl.data.trajectory import Episode, Turn
from agentrl.errors import ConfigError
from agentrl.policy.engine import Generation, GenerationRequest
from agentrl.rollout.play import ActionRequest, EpisodeSpec, Reply, Stop


class Shelves(gymnasium.Env[str, str]):
    """Environment whose task "n" is solved by step n. `on_step` and `on_reset` may falsify the answer."""

    def __init__(self, expert: bool = False, max_steps: int = 100) -> None:
        self.expert, self.max_steps = expert, max_steps
        self.closed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert not self.closed, "a closed environment was used again"
        self.task = (options or {})["task"]
        self.left, self.steps = int(self.task), 0
        return self.on_reset((f"{self.left} shelves", self.info()))

    def step(self, action: str) -> Any:
        assert not self.closed, "a closed environment was used again"
        self.left, self.steps = self.left - 1, self.steps + 1
        done = self.left == 0
        limit = self.steps >= self.max_steps and not done
        answer = (f"{action}: {self.left} left", 1.0 * done, done, limit, self.info())
        return self.on_step(answer)

    def info(self) -> dict[str, Any]:
        info = {"success": self.left == 0, "actions": ["go on", "take mug", "take pen"], "valid": True}
        return info | ({"expert": "go on"} if self.expert else {})

    def on_reset(self, answer: Any) -> Any:
        return answer

    def on_step(self, answer: Any) -> Any:
        return answer

    def close(self) -> None:
        self.closed += 1


class SnapshotShelves(Shelves):
    """Shelves with snapshots, which count the calls by name."""

    calls: ClassVar[Counter[str]] = Counter()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.calls["reset"] += 1
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        self.calls["step"] += 1
        return super().step(action)

    def snapshot(self) -> tuple[str, int, int]:
        self.calls["snapshot"] += 1
        return self.task, self.left, self.steps

    def restore(self, snapshot: tuple[str, int, int]) -> None:
        self.calls["restore"] += 1
        self.task, self.left, self.steps = snapshot


def specs(tasks: Sequence[int], seed: int = 0) -> list[EpisodeSpec]:
    return [EpisodeSpec(f"e{i}", "test/Shelves-v0", str(task), seed + i) for i, task in enumerate(tasks)]


@dataclass
class CountingPlayer:
    """Player that replies to all requests at each poll, and records their number."""

    rounds: list[int] = field(default_factory=list)
    waiting: list[ActionRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    largest: int = 10**9  # replies per poll at most
    forked: list[tuple[str, str, int]] = field(default_factory=list)  # child, parent, turns
    known: set[str] = field(default_factory=set)

    def submit(self, request: ActionRequest) -> None:
        self.known.add(request.episode_id)
        self.waiting.append(request)

    def poll(self) -> list[tuple[str, Reply | Stop]]:
        self.rounds.append(len(self.waiting))
        done, self.waiting = self.waiting[: self.largest], self.waiting[self.largest :]
        return [(request.episode_id, Reply(f"{request.seed % 1000}/{request.turn}")) for request in done]

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        again = child_id in [child for child, _, _ in self.forked]
        assert again or parent_id in self.known, "a parent was closed before its child had left it"
        self.forked.append((child_id, parent_id, len(turns)))

    def close(self, episode_id: str) -> None:
        self.known.discard(episode_id)
        self.closed.append(episode_id)


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    new_sequence: bool
    cut: bool = False


@dataclass(frozen=True)
class Parsed:
    text: str
    valid: bool


class Letters:
    """Dialogue whose ids are code points; a reply ends in 0. `window`: the number of turns kept, or None."""

    stop_ids = frozenset({0})

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.histories: list[list[tuple[str, tuple[int, ...]]]] = []

    def prompt(self, history: Sequence[tuple[str, tuple[int, ...]]], observation: str) -> Prompt:
        self.histories.append(list(history))
        new_sequence = not history or self.window is not None
        return Prompt(tuple(map(ord, observation)), new_sequence)

    def for_episode(self, briefing: Any) -> "Letters":
        return self

    def unsaid(self, actions: Sequence[str]) -> None:
        return None

    def encode_reply(self, text: str) -> tuple[int, ...]:
        return (*map(ord, text), 0)

    def parse(self, ids: Sequence[int]) -> Parsed:
        text = "".join(chr(i) for i in ids if i)
        return Parsed(text, text.startswith(("go", "take")) and ids[-1] == 0)


@dataclass
class ScriptedEngine:
    """Engine that answers each request with the next scripted reply, or with a choice by its seed."""

    script: list[Any] = field(default_factory=list)
    max_context: int = 10_000
    requests: list[GenerationRequest] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    waiting: list[GenerationRequest] = field(default_factory=list)

    def submit(self, request: GenerationRequest) -> None:
        self.requests.append(request)
        self.waiting.append(request)

    def step(self) -> Sequence[Generation]:
        self.batches.append(len(self.waiting))
        waiting, self.waiting = self.waiting, []
        return [self.generate(request) for request in waiting]

    def generate(self, request: GenerationRequest) -> Generation:
        if self.script:
            reply = self.script.pop(0)
            if isinstance(reply, Generation):
                return reply
            ids = (*map(ord, reply), 0)
        elif request.choices is not None:
            ids = request.choices[request.seed % len(request.choices)]
        else:
            raise ConfigError("the script is over")
        some = tuple(0.25 for _ in ids)
        return Generation(request.sequence, ids, tuple(-x for x in some), some, policy_version=3)

    def release(self, sequence: str) -> None:
        self.released.append(sequence)


def by_id(episodes: Sequence[Episode]) -> dict[str, Episode]:
    return {episode.id: episode for episode in episodes}
