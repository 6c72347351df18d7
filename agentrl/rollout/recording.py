"""A player that keeps what another one was asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from agentrl.data.trajectory import Episode, StopReason, Turn
from agentrl.policy.prompt import Observation
from agentrl.rollout.play import ActionRequest, Stop
from agentrl.rollout.players import Answered, Player


@dataclass(frozen=True, slots=True)
class RecordedEpisode(Episode):
    """Episode with the requests that its turns answered."""

    requests: tuple[ActionRequest, ...] = ()


def observations(episode: Episode) -> Iterator[Observation]:
    """Yield the observation of each turn, with all that a recorded episode knows of it."""
    if not isinstance(episode, RecordedEpisode):
        yield from (Observation(turn.observation) for turn in episode.turns)
        return
    for request in episode.requests:
        yield Observation(request.observation, request.actions, request.briefing)


class RecordingPlayer:
    """Player that passes everything on to another one, and keeps the requests.

    Args:
        player: The other player.
        turns: The number of turns after which an episode is stopped; unlike the limit of a collection, the
            requests do not name it. None stops none.

    Attributes:
        requests: The requests of each episode, in order.
    """

    def __init__(self, player: Player, turns: int | None = None) -> None:
        self._player, self._turns = player, turns
        self._stopped: list[str] = []
        self.requests: dict[str, list[ActionRequest]] = {}

    def recorded(self, episode: Episode) -> RecordedEpisode:
        """Return an episode that was played, with its requests."""
        kept = {each.name: getattr(episode, each.name) for each in fields(episode)}
        asked = tuple(self.requests.get(episode.id, ()))[: len(episode.turns)]
        return RecordedEpisode(**kept, requests=asked)

    def submit(self, request: ActionRequest) -> None:
        """Keep a request and pass it on, unless its episode is stopped."""
        if self._turns is not None and request.turn >= self._turns:
            self._stopped.append(request.episode_id)
            return
        if request.turn == 0:  # another attempt at an episode begins anew
            self.requests[request.episode_id] = []
        self.requests[request.episode_id].append(request)
        self._player.submit(request)

    def poll(self) -> Sequence[Answered]:
        """Return the player's answers, or those that stop episodes."""
        if self._stopped:
            stopped, self._stopped = self._stopped, []
            return [(name, Stop(StopReason.TURN_LIMIT)) for name in stopped]
        return self._player.poll()

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Pass the fork on, with the requests of the parent."""
        self.requests[child_id] = self.requests[parent_id][: len(turns)]
        self._player.fork(child_id, parent_id, turns, prefix_ids)

    def close(self, episode_id: str) -> None:
        """Pass the close on; the requests are kept."""
        self._player.close(episode_id)
