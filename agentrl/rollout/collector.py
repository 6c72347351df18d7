"""Drives many episodes at once in this process: who has an answer goes on, who has ended costs nothing."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter

import gymnasium

from agentrl.data.trajectory import Episode, StopReason
from agentrl.env.answers import reset_answer, step_answer
from agentrl.errors import AgentRLError, EnvironmentContractError
from agentrl.rollout.play import (
    ActionRequest,
    Answer,
    Effect,
    EpisodeSpec,
    Reset,
    Step,
    Stop,
    Transition,
    play,
)
from agentrl.rollout.players import Player

TextGym = gymnasium.Env[str, str]


@dataclass(frozen=True, slots=True)
class Collection:
    """Episodes in the order of their specs, and where the time went."""

    episodes: tuple[Episode, ...]
    environment_seconds: float
    player_seconds: float


class EnvironmentPool:
    """Environments to be used again; `make` is called when none is free.

    Used as a context manager, or closed, it closes those on loan as well; it makes new ones if asked again.
    """

    def __init__(self, make: Callable[[], TextGym]) -> None:
        self._make = make
        self._free: list[TextGym] = []
        self._lent: dict[int, TextGym] = {}

    def take(self) -> TextGym:
        env = self._free.pop() if self._free else self._make()
        self._lent[id(env)] = env
        return env

    def give_back(self, env: TextGym) -> None:
        if self._lent.pop(id(env), None) is not None:
            self._free.append(env)

    def discard(self, env: TextGym) -> None:
        """Close an environment that cannot be trusted any more."""
        self._lent.pop(id(env), None)
        with suppress(Exception):  # it is broken already, and nobody waits for it
            env.close()

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        """An environment for the length of a `with` block."""
        env = self.take()
        try:
            yield env
        except BaseException:
            self.discard(env)
            raise
        self.give_back(env)

    def close(self) -> None:
        while self._free:
            self.discard(self._free.pop())
        for env in list(self._lent.values()):
            self.discard(env)

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def collect(
    specs: Sequence[EpisodeSpec],
    player: Player,
    environments: EnvironmentPool,
    *,
    max_active: int,
    max_turns: int | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> Collection:
    """Play episodes to their end, at most `max_active` at a time.

    An episode asks for its next reply as soon as its environment has answered, and a new one starts as soon
    as one ends. What an environment does wrong ends its episode as aborted and concerns no other.

    Args:
        specs: what to play; ids must differ.
        player: who replies.
        environments: where. Each is used by one episode at a time, and thrown away after an error.
        max_active: episodes, and so environments, at a time.
        max_turns: limit on replies beside the environment's own.
        on_episode: called with each episode as it ends.

    Returns:
        The episodes in the order of `specs`.

    Raises:
        AgentRLError: an environment could not be made, for a reason that its user can mend.
        BaseException: what `player` and `on_episode` raise, and interrupts; environments are closed first.
    """
    if max_active < 1:
        raise ValueError(f"max_active is {max_active}, wanted at least 1")
    if len({spec.id for spec in specs}) != len(specs):
        raise ValueError("two of the episode specs have the same id")
    drive = _Drive(player, environments, max_turns, on_episode)
    try:
        return drive.run(specs, max_active)
    except BaseException:
        environments.close()
        for episode_id in drive.active:
            with suppress(Exception):  # what is on its way up matters more
                player.close(episode_id)
        raise


@dataclass(slots=True)
class _Running:
    spec: EpisodeSpec
    loop: Generator[Effect, Answer, Episode]
    env: TextGym | None = None


@dataclass(slots=True)
class _Drive:
    player: Player
    environments: EnvironmentPool
    max_turns: int | None
    on_episode: Callable[[Episode], None] | None
    active: dict[str, _Running] = field(default_factory=dict)
    finished: dict[str, Episode] = field(default_factory=dict)
    environment_seconds: float = 0.0
    player_seconds: float = 0.0

    def run(self, specs: Sequence[EpisodeSpec], max_active: int) -> Collection:
        waiting = iter(specs)
        while True:
            while len(self.active) < max_active and (spec := next(waiting, None)) is not None:
                self._start(spec)
            if not self.active:
                break
            began = perf_counter()
            answers = self.player.poll()
            self.player_seconds += perf_counter() - began
            for episode_id, answer in answers:
                if episode_id not in self.active:
                    raise ValueError(f"the player replied for {episode_id!r}, which is not being played")
                self._advance(self.active[episode_id], answer)
        episodes = tuple(self.finished[spec.id] for spec in specs)
        return Collection(episodes, self.environment_seconds, self.player_seconds)

    def _start(self, spec: EpisodeSpec) -> None:
        running = self.active[spec.id] = _Running(spec, play(spec, self.max_turns))
        self._handle(running, next(running.loop))

    def _advance(self, running: _Running, answer: Answer) -> None:
        try:
            effect = running.loop.send(answer)
        except StopIteration as end:
            self._finish(running, end.value)
        else:
            self._handle(running, effect)

    def _handle(self, running: _Running, effect: Effect) -> None:
        """Answer all that the episode wants of its environment, until it wants a reply or has ended."""
        if isinstance(effect, ActionRequest):
            began = perf_counter()
            self.player.submit(effect)
            self.player_seconds += perf_counter() - began
        else:
            self._advance(running, self._ask(running, effect))

    def _ask(self, running: _Running, effect: Reset | Step) -> Transition | Stop:
        began = perf_counter()
        try:
            if running.env is None:
                running.env = self.environments.take()
            return _transition(running.env, effect)
        except Exception as error:
            if running.env is None and isinstance(error, AgentRLError):
                raise  # an argument or a package is wrong: every other episode would say the same
            if isinstance(error, EnvironmentContractError):
                return Stop(StopReason.CONTRACT, str(error))
            return Stop(StopReason.ENV_ERROR, f"{type(error).__name__}: {error}")
        finally:
            self.environment_seconds += perf_counter() - began

    def _finish(self, running: _Running, episode: Episode) -> None:
        del self.active[episode.id]
        if running.env is not None:
            if episode.stop.aborted:
                self.environments.discard(running.env)
            else:
                self.environments.give_back(running.env)
        self.player.close(episode.id)
        self.finished[episode.id] = episode
        if self.on_episode is not None:
            self.on_episode(episode)


def _transition(env: TextGym, effect: Reset | Step) -> Transition:
    if isinstance(effect, Step):
        return Transition(*step_answer(env.step(effect.action)))
    observation, info = reset_answer(env.reset(seed=effect.seed, options={"task": effect.task}))
    return Transition(observation, info=info)
