"""Play one episode in the terminal, by a policy or by yourself."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.rule import Rule

from agentrl.data.trajectory import Episode, Turn
from agentrl.env.registry import make
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, EpisodeSpec, Reply, Stop
from agentrl.rollout.players import HumanPlayer, Player, scripted_player
from agentrl.terminal import plain


def watch(
    console: Console,
    env: str,
    policy: str = "human",
    *,
    kwargs: Mapping[str, Any] | None = None,
    task: str | None = None,
    split: str | None = None,
    seed: int = 0,
    temperature: float = 1.0,
) -> Episode:
    """Play one episode and print each turn.

    Args:
        console: The console to print to and to read a human player's commands from.
        env: The environment's id.
        policy: `human`, `random`, `expert`, a run's folder or name, or a model as `policy.path`
            names one.
        kwargs: The arguments of the environment; those of a run that was trained on it are added.
        task: The task's id; None selects one by the seed.
        split: The split to select it from; None takes the run's held-out split, else the environment's first.
        seed: The seed of the environment and of the policy's sampling.
        temperature: The sampling temperature; 0 is greedy.

    Raises:
        ConfigError: If the environment, the split or an argument is unknown.
        CheckpointError: If there is no such policy.
        KeyboardInterrupt: If the human player leaves.
    """
    player, kwargs, split = _open_player(console, env, policy, dict(kwargs or {}), split, temperature)
    if split is not None:
        kwargs["split"] = split
    with EnvironmentPool(lambda: make(env, **kwargs)) as environments:
        if task is None:
            with environments.borrow() as environment:
                known: Any = environment.unwrapped
                tasks = known.tasks(split or known.splits[0])
                task = str(tasks[seed % len(tasks)])
        spec = EpisodeSpec("watched", env, task, seed)
        (episode,) = collect([spec], _PrintingPlayer(player, console), environments, max_active=1).episodes
    if not episode.stop.aborted:
        _print_ending(console, episode)
    return episode


def _open_player(
    console: Console, env: str, policy: str, kwargs: dict[str, Any], split: str | None, temperature: float
) -> tuple[Player, dict[str, Any], str | None]:
    """Open the player, and complete the environment's arguments and the split."""
    if policy == "human":
        return HumanPlayer(_CommandPrompt(console)), kwargs, split
    if policy in ("random", "expert"):
        return scripted_player(policy), kwargs | ({"expert": True} if policy == "expert" else {}), split
    from agentrl.evaluation.panels import find_split
    from agentrl.run.policies import open_player  # loads torch, which only a trained policy needs

    player, config = open_player(policy, temperature=temperature)
    trained_on = config.find_environment(env)
    if trained_on is None:
        return player, kwargs, split
    kwargs = {**trained_on.kwargs, **kwargs}
    return player, kwargs, split or find_split(env, kwargs, config.evaluation.split)


class _CommandPrompt:
    """Prompt for a command, given by its number or as text."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, request: ActionRequest) -> str:
        actions = request.actions or ()
        self._console.print(
            Columns([plain(f"{i:>3} {name}") for i, name in enumerate(actions, start=1)], padding=(0, 2))
        )
        while True:
            try:
                answer = self._console.input("number or command (Ctrl-D leaves) > ").strip()
            except EOFError as error:
                raise KeyboardInterrupt("left the game") from error
            if answer.isdecimal() and actions:
                if 1 <= int(answer) <= len(actions):
                    return actions[int(answer) - 1]
                self._console.print(f"there are {len(actions)} commands")
            elif answer:
                return answer


class _PrintingPlayer:
    """Player that prints the observations and replies of another player."""

    def __init__(self, player: Player, console: Console) -> None:
        self._player = player
        self._console = console

    def submit(self, request: ActionRequest) -> None:
        """Print the observation and pass the request on."""
        self._console.print(Rule(f"turn {request.turn + 1}", align="left", style="dim"))
        self._console.print(plain(request.observation))
        self._player.submit(request)

    def poll(self) -> Sequence[tuple[str, Reply | Stop]]:
        """Return the player's answers, printed unless a human typed them."""
        answers = self._player.poll()
        for _, answer in answers:
            if isinstance(answer, Reply) and not isinstance(self._player, HumanPlayer):
                self._console.print(plain(f"> {answer.text}", "bold"), plain(_format_entropy(answer), "dim"))
        return answers

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Pass the fork on."""
        self._player.fork(child_id, parent_id, turns, prefix_ids)

    def close(self, episode_id: str) -> None:
        """Pass the close on."""
        self._player.close(episode_id)


def _format_entropy(reply: Reply) -> str:
    value = Turn(
        "", "", action_ids=reply.action_ids, entropies=reply.entropies, allowed=reply.allowed
    ).entropy
    return "" if value is None else f"entropy {value:.3f}"


def _print_ending(console: Console, episode: Episode) -> None:
    ending = f"after {len(episode.turns)} turns ({episode.stop.value}), return {episode.episode_return:g}"
    console.print(Rule(style="dim"))
    console.print(plain(episode.final_observation))
    console.print(plain(episode.outcome.value, "bold"), plain(f"{ending}, task {episode.task}"))
