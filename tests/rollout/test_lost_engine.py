"""The loss of an engine does not count against its episodes: they are played again."""

from collections.abc import Sequence

from shelves import Shelves

from agentrl.data.trajectory import StopReason
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.play import Collection, EpisodeSpec, Stop
from agentrl.rollout.players import Answered, RandomPlayer


class Losing(RandomPlayer):
    """Player whose first polls fail."""

    def __init__(self, polls: int, bystander: bool) -> None:
        super().__init__()
        self.polls, self.bystander = polls, bystander

    def poll(self) -> Sequence[Answered]:
        self.polls -= 1
        lost = Stop(StopReason.ENGINE_ERROR, "lost", bystander=self.bystander)
        return [(name, lost if self.polls >= 0 else reply) for name, reply in super().poll()]


def played(player: Losing, quarantine: Quarantine | None = None) -> Collection:
    specs = [EpisodeSpec("e", "test/Shelves-v0", "2", 0)]
    pool = EnvironmentPool(Shelves)
    return collect(specs, player, pool, max_active=1, max_attempts=1, quarantine=quarantine)


def test_an_episode_whose_engine_was_lost_is_played_again_and_nobody_is_blamed() -> None:
    quarantine = Quarantine(1)
    found = played(Losing(3, bystander=True), quarantine)
    assert [episode.stop for episode in found.episodes] == [StopReason.TERMINATED]
    assert [failure.error for failure in found.failures] == ["lost"] * 3
    assert quarantine.tasks == {}


def test_an_engine_that_is_lost_ten_times_under_an_episode_ends_it() -> None:
    found = played(Losing(99, bystander=True))
    assert [episode.stop for episode in found.episodes] == [StopReason.ENGINE_ERROR]
    assert len(found.failures) == 9


def test_a_request_that_the_engine_refuses_is_not_made_again() -> None:
    found = played(Losing(1, bystander=False))
    assert [episode.stop for episode in found.episodes] == [StopReason.ENGINE_ERROR]
    assert found.failures == ()
