"""Many episodes at once: one that has ended costs nothing, and a failure in one affects no other."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shelves import CountingPlayer, Shelves, by_id, specs

from agentrl.data.trajectory import Episode, Outcome, StopReason
from agentrl.env.containment import MAX_ANSWER_BYTES, open_env
from agentrl.errors import ConfigError, EnvironmentContractError
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, EpisodeSpec, Reply, Stop
from agentrl.rollout.players import RandomPlayer


class Made:
    """Factory that records the environments it makes."""

    def __init__(self, kind: Callable[[], Shelves] = Shelves) -> None:
        self.kind, self.envs = kind, list[Shelves]()

    def __call__(self) -> Shelves:
        self.envs.append(self.kind())
        return self.envs[-1]


def test_episodes_come_in_the_order_of_their_specs_whatever_order_they_end_in() -> None:
    ended: list[str] = []
    collection = collect(
        specs([5, 1, 3]),
        CountingPlayer(),
        EnvironmentPool(Shelves),
        max_active=3,
        on_episode=lambda episode: ended.append(episode.id),
    )
    assert [episode.id for episode in collection.episodes] == ["e0", "e1", "e2"]
    assert ended == ["e1", "e2", "e0"]
    assert [len(episode.turns) for episode in collection.episodes] == [5, 1, 3]
    assert all(episode.outcome == Outcome.SUCCESS for episode in collection.episodes)


def test_an_episode_that_ended_costs_nothing_and_its_place_is_taken_at_once() -> None:
    # Two places. e0 takes 4 rounds; beside it e1 takes 1, e2 takes 2, e3 starts in round 4 and needs round 5.
    player = CountingPlayer()
    collect(specs([4, 1, 2, 2]), player, EnvironmentPool(Shelves), max_active=2)
    assert player.rounds == [2, 2, 2, 2, 1]
    assert sum(player.rounds) == 4 + 1 + 2 + 2
    # In lock-step, batches of two would have cost max(4, 1) + max(2, 2) = 6 rounds of 2.


def test_requests_are_only_made_for_turns_that_are_played() -> None:
    tasks = [1, 7, 2, 9, 3, 3, 1, 12]
    for max_active in (1, 3, 8, 100):
        player = CountingPlayer()
        collect(specs(tasks), player, EnvironmentPool(Shelves), max_active=max_active)
        assert sum(player.rounds) == sum(tasks)
        assert max(player.rounds) <= max_active


def test_never_more_environments_than_episodes_at_a_time() -> None:
    made = Made()
    with EnvironmentPool(made) as pool:
        collect(specs([2] * 10), CountingPlayer(), pool, max_active=3)
        assert len(made.envs) == 3
        collect(specs([2] * 10), CountingPlayer(), pool, max_active=3)
        assert len(made.envs) == 3
        assert [env.closed for env in made.envs] == [0, 0, 0]
    assert [env.closed for env in made.envs] == [1, 1, 1]


@pytest.mark.parametrize("player", [CountingPlayer, lambda: CountingPlayer(largest=1), RandomPlayer])
def test_the_result_does_not_depend_on_how_many_play_at_once(player: Callable[[], Any]) -> None:
    results = [
        collect(specs([5, 1, 3, 8, 2, 4]), player(), EnvironmentPool(Shelves), max_active=n).episodes
        for n in (1, 2, 6)
    ]
    assert results[0] == results[1] == results[2]
    assert len({turn.action for episode in results[0] for turn in episode.turns}) > 2


def test_the_turn_limit_is_kept() -> None:
    player = CountingPlayer()
    (episode,) = collect(specs([9]), player, EnvironmentPool(Shelves), max_active=1, max_turns=4).episodes
    assert (episode.stop, len(episode.turns), sum(player.rounds)) == (StopReason.TURN_LIMIT, 4, 4)


def test_the_environments_step_limit_is_told_apart_from_the_collectors() -> None:
    pool = EnvironmentPool(lambda: Shelves(max_steps=3))
    (episode,) = collect(specs([9]), CountingPlayer(), pool, max_active=1, max_turns=50).episodes
    assert (episode.stop, len(episode.turns), episode.outcome) == (StopReason.TRUNCATED, 3, Outcome.FAILURE)


def test_nothing_to_play_is_nothing_played() -> None:
    made = Made()
    assert collect([], CountingPlayer(), EnvironmentPool(made), max_active=4).episodes == ()
    assert not made.envs


def test_the_player_is_told_of_every_end() -> None:
    player = CountingPlayer()
    collect(specs([1, 2, 3]), player, EnvironmentPool(Shelves), max_active=2)
    assert sorted(player.closed) == ["e0", "e1", "e2"]


def test_time_is_told_apart_into_environments_and_player(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(Shelves):
        def on_reset(self, answer: Any) -> Any:
            spend(100)
            return answer

        def on_step(self, answer: Any) -> Any:
            spend(10)
            return answer

    class Thinking(CountingPlayer):
        def submit(self, request: ActionRequest) -> None:
            spend(0.5)
            super().submit(request)

        def poll(self) -> Any:
            spend(1)
            return super().poll()

    monkeypatch.setattr("agentrl.rollout.collector.perf_counter", lambda: now)
    pool = EnvironmentPool(Slow)
    collection = collect(specs([2, 3]), Thinking(), pool, max_active=2, on_episode=lambda _: spend(1000))
    assert collection.environment_seconds == 2 * 100 + 5 * 10
    assert collection.player_seconds == 5 * 0.5 + 3 * 1


# Errors of an environment, which occur in task 3.


def spoil(where: str, wrong: Callable[[Any], Any]) -> Callable[[], Shelves]:
    class Spoilt(Shelves):
        def on_reset(self, answer: Any) -> Any:
            return wrong(answer) if where == "reset" and self.task == "3" else answer

        def on_step(self, answer: Any) -> Any:
            return wrong(answer) if where == "step" and self.task == "3" and self.steps == 2 else answer

    return Spoilt


def raise_(error: BaseException) -> Callable[[Any], Any]:
    def wrong(answer: Any) -> Any:
        raise error

    return wrong


def with_part(index: int, value: Any) -> Callable[[Any], Any]:
    return lambda answer: (*answer[:index], value, *answer[index + 1 :])


def with_info(**more: Any) -> Callable[[Any], Any]:
    return lambda answer: (*answer[:-1], {k: v for k, v in (answer[-1] | more).items() if v is not ...})


WRONGS: list[tuple[str, Callable[[Any], Any], StopReason, str]] = [
    ("reset", raise_(ValueError("no such file")), StopReason.ENV_ERROR, "ValueError: no such file"),
    (
        "step",
        raise_(ZeroDivisionError("division by zero")),
        StopReason.ENV_ERROR,
        "ZeroDivisionError: division",
    ),
    ("step", raise_(ConfigError("not now")), StopReason.ENV_ERROR, "ConfigError: not now"),
    ("step", raise_(MemoryError()), StopReason.ENV_ERROR, "MemoryError"),
    (
        "reset",
        with_part(0, b"bytes"),
        StopReason.CONTRACT,
        "reset: the observation is b'bytes' (bytes), wanted a str",
    ),
    (
        "step",
        with_part(0, None),
        StopReason.CONTRACT,
        "step: the observation is None (NoneType), wanted a str",
    ),
    ("step", with_part(0, "\ud800"), StopReason.CONTRACT, "lone surrogate at character 0"),
    (
        "step",
        with_part(1, float("nan")),
        StopReason.CONTRACT,
        "the reward is nan (float), wanted a finite real",
    ),
    ("step", with_part(1, float("inf")), StopReason.CONTRACT, "the reward is inf"),
    ("step", with_part(1, None), StopReason.CONTRACT, "the reward is None"),
    ("step", with_part(2, 1), StopReason.CONTRACT, "terminated is 1 (int), wanted a bool"),
    (
        "step",
        with_part(3, np.int64(0)),
        StopReason.CONTRACT,
        "truncated is np.int64(0) (int64), wanted",
    ),
    ("step", with_part(4, None), StopReason.CONTRACT, "info is None"),
    (
        "step",
        lambda answer: answer[:4],
        StopReason.CONTRACT,
        "step: returned a tuple of 4, wanted the tuple (obs",
    ),
    ("step", lambda answer: list(answer), StopReason.CONTRACT, "step: returned ["),
    (
        "reset",
        lambda answer: answer[0],
        StopReason.CONTRACT,
        "reset: returned '3 shelves' (str), wanted the tuple",
    ),
    ("reset", with_info(success=...), StopReason.CONTRACT, "reset: info['success'] is missing"),
    ("step", with_info(success=...), StopReason.CONTRACT, "step: info['success'] is missing"),
    ("step", with_info(success=0), StopReason.CONTRACT, "info['success'] is 0 (int), wanted a bool"),
    (
        "step",
        with_info(actions="look"),
        StopReason.CONTRACT,
        "info['actions'] is 'look' (str), wanted a list of str",
    ),
    ("step", with_info(actions=["look", 3]), StopReason.CONTRACT, "info['actions'] contains 3 (int)"),
    ("step", with_info(valid=None), StopReason.CONTRACT, "info['valid'] is None"),
    ("step", with_info(state_key=["k"]), StopReason.CONTRACT, "info['state_key'] is ['k'] (list)"),
    ("step", with_info(score="high"), StopReason.CONTRACT, "info['score'] is 'high' (str), wanted a finite"),
]


@pytest.mark.parametrize(("where", "wrong", "stop", "error"), WRONGS)
def test_what_an_environment_does_wrong_aborts_its_episode_and_no_other(
    where: str, wrong: Callable[[Any], Any], stop: StopReason, error: str
) -> None:
    tasks = [5, 3, 4, 2, 6]
    made = Made(spoil(where, wrong))
    player = CountingPlayer()
    episodes = by_id(collect(specs(tasks), player, EnvironmentPool(made), max_active=2).episodes)
    healthy = by_id(collect(specs(tasks), CountingPlayer(), EnvironmentPool(Shelves), max_active=2).episodes)
    spoilt = episodes.pop("e1")
    healthy.pop("e1")
    assert episodes == healthy
    assert (spoilt.stop, spoilt.outcome, spoilt.success) == (stop, Outcome.ABORTED, False)
    assert error in (spoilt.error or "")
    assert len(spoilt.turns) == (0 if where == "reset" else 2)
    assert spoilt.episode_return == 0.0
    assert sorted(player.closed) == ["e0", "e1", "e2", "e3", "e4"]


def test_an_environment_that_failed_is_closed_and_never_used_again() -> None:
    made = Made(spoil("step", raise_(ValueError("broken"))))
    collect(specs([3, 3, 3, 2]), CountingPlayer(), EnvironmentPool(made), max_active=1)
    assert [env.closed for env in made.envs] == [1, 1, 1, 0]


def test_an_environment_that_cannot_even_be_closed_hurts_nobody() -> None:
    class Stuck(Shelves):
        def step(self, action: str) -> Any:
            raise ValueError("broken")

        def close(self) -> None:
            raise OSError("stuck")

    with EnvironmentPool(Stuck) as pool:
        episodes = collect(specs([1, 2]), CountingPlayer(), pool, max_active=1).episodes
    assert [episode.stop for episode in episodes] == [StopReason.ENV_ERROR] * 2


def test_an_environment_that_was_given_back_in_the_middle_of_an_episode_serves_the_next() -> None:
    class Fickle(CountingPlayer):
        def poll(self) -> Any:
            return [
                (name, Stop(StopReason.ENGINE_ERROR, "no") if name == "e0" else reply)
                for name, reply in super().poll()
            ]

    made = Made()
    episodes = collect(specs([5, 5]), Fickle(), EnvironmentPool(made), max_active=1).episodes
    assert [episode.stop for episode in episodes] == [StopReason.ENGINE_ERROR, StopReason.TERMINATED]


def test_an_environment_that_cannot_be_made_for_once_aborts_one_episode() -> None:
    calls = Counter[str]()

    def make() -> Shelves:
        calls["made"] += 1
        if calls["made"] == 1:
            raise ConnectionError("refused")
        return Shelves()

    episodes = collect(specs([1, 1]), CountingPlayer(), EnvironmentPool(make), max_active=1).episodes
    assert [(episode.stop, episode.error) for episode in episodes] == [
        (StopReason.ENV_ERROR, "ConnectionError: refused"),
        (StopReason.TERMINATED, None),
    ]


def test_an_environment_that_nobody_can_make_stops_the_run_with_its_message() -> None:
    def make() -> Shelves:
        raise ConfigError("argument of test/Shelves-v0 'dors' is unknown")

    with pytest.raises(ConfigError, match="'dors' is unknown"):
        collect(specs([1, 1]), CountingPlayer(), EnvironmentPool(make), max_active=1)


class Unprintable(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no text")


ESCAPES = [
    (SystemExit(0), "SystemExit: 0"),
    (KeyboardInterrupt("mine"), "KeyboardInterrupt: mine"),
    (GeneratorExit(), "GeneratorExit: "),
    (Unprintable(), "Unprintable: a message that cannot be read"),
]


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
@pytest.mark.parametrize(("error", "said"), ESCAPES, ids=[type(error).__name__ for error, _ in ESCAPES])
def test_what_is_raised_to_end_a_program_ends_an_episode(error: BaseException, said: str, where: str) -> None:
    calls = {"made": 0}

    def make() -> Shelves:
        calls["made"] += 1
        if where == "constructor" and calls["made"] == 2:
            raise error
        return spoil(where, raise_(error))()

    found = by_id(collect(specs([2, 3, 4]), CountingPlayer(), EnvironmentPool(make), max_active=3).episodes)
    assert (found["e1"].stop, found["e1"].error) == (StopReason.ENV_ERROR, said)
    assert [found[name].outcome for name in ("e0", "e2")] == [Outcome.SUCCESS] * 2


def test_an_environment_may_exit_when_it_is_closed() -> None:
    class Leaving(Shelves):
        def close(self) -> None:
            raise SystemExit(1)

    with EnvironmentPool(Leaving) as pool:
        (episode,) = collect(specs([2]), CountingPlayer(), pool, max_active=1).episodes
    assert episode.outcome is Outcome.SUCCESS


def test_who_borrows_an_environment_that_exits_is_told_by_an_error_of_ours() -> None:
    class Leaving(Shelves):
        def tasks(self, split: str) -> list[str]:
            raise SystemExit(0)

    def unmade() -> Shelves:
        raise SystemExit(0)

    said = "the environment's tasks raised SystemExit: 0"
    with EnvironmentPool(Leaving) as pool, pytest.raises(EnvironmentContractError, match=said):  # noqa: SIM117
        with pool.borrow() as env:
            env.unwrapped.tasks("train")  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentContractError, match="constructor raised SystemExit: 0"):
        EnvironmentPool(unmade).borrow().__enter__()


def test_tasks_that_are_asked_for_in_this_process_do_not_end_it() -> None:
    def unmade() -> Shelves:
        raise SystemExit(0)

    class Leaving(Shelves):
        def tasks(self, split: str) -> list[str]:
            raise SystemExit(3)

        def close(self) -> None:
            raise SystemExit(4)

    with pytest.raises(EnvironmentContractError, match="constructor raised SystemExit: 0"), open_env(unmade):
        pass
    with pytest.raises(EnvironmentContractError, match="raised SystemExit: 3"), open_env(Leaving) as env:
        env.tasks("train")


def test_a_fork_that_comes_back_from_an_environment_ends_there(tmp_path: Path) -> None:
    def fork(answer: Any) -> Any:
        os.fork()
        return answer

    found = collect(
        specs([2, 3, 4]),
        CountingPlayer(),
        EnvironmentPool(spoil("step", fork)),
        max_active=3,
        on_episode=lambda episode: (tmp_path / f"{episode.id}-{os.getpid()}").touch(),
    )
    episodes = sorted(path.name for path in tmp_path.iterdir())
    assert episodes == [f"e{number}-{os.getpid()}" for number in range(3)]
    assert [episode.outcome for episode in found.episodes] == [Outcome.SUCCESS] * 3
    assert os.wait()[1] == 0  # the copy


@pytest.mark.parametrize("part", ["observation", "info"])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_answer_of_hundreds_of_megabytes_is_refused(where: str, part: str) -> None:
    huge = "x" * (MAX_ANSWER_BYTES + 1)
    wrong = with_part(0, huge) if part == "observation" else with_info(map={"rows": [[huge]]})
    found = by_id(
        collect(specs([3, 2]), CountingPlayer(), EnvironmentPool(spoil(where, wrong)), max_active=2).episodes
    )
    assert found["e0"].stop is StopReason.CONTRACT
    assert "the observation and info of one call take 16 MB, wanted at most 16 MB" in str(found["e0"].error)
    assert found["e1"].outcome is Outcome.SUCCESS


# Interrupts.


def press_ctrl_c(answer: Any) -> Any:
    signal.raise_signal(signal.SIGINT)
    return answer


@pytest.mark.parametrize(
    ("interrupt", "where"),
    [
        *((KeyboardInterrupt, where) for where in ("reset", "step", "poll", "submit", "on_episode")),
        *((SystemExit, where) for where in ("poll", "submit", "on_episode")),
    ],
)
def test_an_interrupt_passes_through_and_closes_every_environment(
    interrupt: type[BaseException], where: str
) -> None:
    class Interrupted(CountingPlayer):
        def submit(self, request: ActionRequest) -> None:
            if where == "submit" and request.turn == 1:
                raise interrupt
            super().submit(request)

        def poll(self) -> Any:
            if where == "poll" and len(self.rounds) == 2:
                raise interrupt
            return super().poll()

    def on_episode(episode: Episode) -> None:
        if where == "on_episode":
            raise interrupt

    made = Made(spoil(where, press_ctrl_c))
    pool, player = EnvironmentPool(made), Interrupted()
    with pytest.raises(interrupt):
        collect(specs([5, 2, 3, 4]), player, pool, max_active=3, on_episode=on_episode)
    assert made.envs
    assert all(env.closed == 1 for env in made.envs)
    # After an interrupt, the same pool and player can be used again.
    where = "nowhere"
    player.waiting.clear()
    episodes = collect(specs([5, 2]), player, pool, max_active=2).episodes
    assert [episode.outcome for episode in episodes] == [Outcome.SUCCESS] * 2


def test_an_interrupt_lets_the_player_forget_what_was_running() -> None:
    player = CountingPlayer()
    with pytest.raises(KeyboardInterrupt):
        collect(
            specs([9, 3, 9]),
            player,
            EnvironmentPool(spoil("step", press_ctrl_c)),
            max_active=3,
        )
    assert sorted(player.closed) == ["e0", "e1", "e2"]


@pytest.mark.parametrize("excuse", [None, RuntimeError, SystemExit])
def test_ctrl_c_ends_the_collection_whatever_the_environment_makes_of_it(
    excuse: type[BaseException] | None,
) -> None:
    def catch(answer: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            if excuse is not None:
                raise excuse("bad luck") from None
        return answer

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        collect(specs([3, 3]), CountingPlayer(), EnvironmentPool(spoil("step", catch)), max_active=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_an_environment_puts_in_place_stays_there() -> None:
    def own(number: int, frame: Any) -> None: ...

    def install(answer: Any) -> Any:
        signal.signal(signal.SIGALRM, own)
        return answer

    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        collect(specs([3]), CountingPlayer(), EnvironmentPool(spoil("step", install)), max_active=1)
        assert signal.getsignal(signal.SIGALRM) is own
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_players_own_fault_is_not_an_aborted_episode() -> None:
    class Faulty(CountingPlayer):
        def poll(self) -> Any:
            raise RuntimeError("out of memory")

    made = Made()
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(specs([1, 1]), Faulty(), EnvironmentPool(made), max_active=2)
    assert [env.closed for env in made.envs] == [1, 1]


# Misuse.


def test_environments_that_someone_else_closes_end_the_collection() -> None:
    class Closed(EnvironmentPool):
        def poll(self, *, wait: bool) -> Any:
            self.close()
            return super().poll(wait=wait)

    with pytest.raises(RuntimeError, match="closed while episodes were played"):
        collect(specs([3]), RandomPlayer(), Closed(Shelves), max_active=1)


def test_two_specs_of_one_id_are_refused() -> None:
    twice = [EpisodeSpec("e", "test/Shelves-v0", "1", 0)] * 2
    with pytest.raises(ValueError, match="same id"):
        collect(twice, CountingPlayer(), EnvironmentPool(Shelves), max_active=1)


def test_no_place_to_play_is_refused() -> None:
    with pytest.raises(ValueError, match="max_active is 0"):
        collect(specs([1]), CountingPlayer(), EnvironmentPool(Shelves), max_active=0)


def test_a_reply_for_nobody_is_refused() -> None:
    class Confused(CountingPlayer):
        def poll(self) -> Any:
            return [("e7", Reply("x"))]

    with pytest.raises(ValueError, match="replied to 'e7'"):
        collect(specs([1]), Confused(), EnvironmentPool(Shelves), max_active=1)


def test_borrowing_gives_back_and_throws_away_what_was_broken() -> None:
    made = Made()
    pool = EnvironmentPool(made)
    with pool.borrow() as env:
        env.reset(options={"task": "1"})
    with pool.borrow() as again:
        assert again is env
    with pytest.raises(KeyError), pool.borrow():
        raise KeyError
    assert made.envs[0].closed == 1
    with pool.borrow():
        assert len(made.envs) == 2
