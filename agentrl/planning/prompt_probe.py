"""The prompts of an episode that is played without the policy: what they say, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.prompt import Example
from agentrl.policy.tokens import configured_dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import Environments
from agentrl.rollout.play import ActionRequest, EpisodeSpec
from agentrl.rollout.players import Player, RandomPlayer
from agentrl.rollout.recording import RecordedEpisode, RecordingPlayer, observations
from agentrl.run.policies import Policy
from agentrl.run.settings import RunConfig

_MAX_TURNS = 50  # of the episode that is measured


@dataclass(frozen=True, slots=True)
class PromptTurn:
    """One turn as the policy would have read and written it.

    Args:
        prompt: The ids of the prompt.
        reply: The ids of the reply.
        command: The command that the reply gives.
        begins: Whether the prompt begins a sequence.
        cut: Whether its observation is cut.
        length: The number of tokens of the sequence, with the reply.
    """

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    command: str
    begins: bool
    cut: bool
    length: int


def record_play(
    config: RunConfig, environments: Environments, task: str, player: Player, turns: int
) -> RecordedEpisode:
    """Play the first turns of an episode, and keep its requests."""
    recorder = RecordingPlayer(player, turns)
    spec = EpisodeSpec(f"prompts-{task}", config.environment_of(task).id, task, config.seed)
    limit = config.rollout.max_turns
    (episode,) = collect([spec], recorder, environments, max_active=1, max_turns=limit).episodes
    return recorder.recorded(episode)


def write_turns(dialogue: Dialogue, episode: Episode) -> list[PromptTurn]:
    """Return the turns of an episode as the tokens of a dialogue."""
    history: list[tuple[str, tuple[int, ...]]] = []
    turns: list[PromptTurn] = []
    length = 0
    for observation, turn in zip(observations(episode), episode.turns, strict=True):
        own = dialogue.for_episode(observation.briefing)
        prompt, reply = own.prompt(history, observation), own.encode_reply(turn.action)
        length = (0 if prompt.new_sequence else length) + len(prompt.ids) + len(reply)
        turns.append(PromptTurn(prompt.ids, reply, turn.action, prompt.new_sequence, prompt.cut, length))
        history.append((observation, reply))
    return turns


def check_prompts(
    config: RunConfig,
    environments: Environments,
    tasks: Sequence[str],
    policy: Policy,
    examples: Sequence[Example] = (),
) -> list[str]:
    """Check that the first prompts leave room for a reply, and say what prompts written anew cost.

    Random play of a task of each environment is measured, where the configuration has a prompt of its own.

    Args:
        config: The configuration, with the context that the model has.
        environments: The environments of the run.
        tasks: A task of each environment.
        policy: The policy.
        examples: The solved examples that its prompt shows.

    Returns:
        Lines for the log; none if the dialogue grows, as usual.

    Raises:
        ConfigError: If a first prompt is too long.
    """
    if policy.dialogue.wording.prompt is None:
        return []
    found = {task: _check_prompt(config, environments, task, policy, examples) for task in tasks}
    return [
        note if len(tasks) == 1 else f"{config.environment_of(task).label}: {note}"
        for task, note in found.items()
        if note is not None
    ]


def _check_prompt(
    config: RunConfig, environments: Environments, task: str, policy: Policy, examples: Sequence[Example]
) -> str | None:
    dialogue, block = policy.dialogue, config.policy
    play = record_play(config, environments, task, RandomPlayer(), _MAX_TURNS)
    if play.stop.aborted or not play.requests:
        return None  # the run's own episodes record why
    turns = write_turns(dialogue, play)
    first, room = turns[0], _reply_room(config, dialogue, play.requests[0])
    if block.max_context is not None and len(first.prompt) + room > block.max_context:
        raise ConfigError(
            f"policy.prompt={block.prompt}: the first prompt of task {task} has {len(first.prompt):,} "
            f"tokens, and a reply up to {room:,}, but policy.max_context is {block.max_context:,}; wanted a "
            "larger context, a shorter prompt, fewer policy.examples or a smaller "
            "policy.max_observation_tokens"
        )
    if dialogue.wording.history is None:
        return None
    whole = configured_dialogue(replace(block, history="full"), policy.tokenizer, examples=examples)
    anew, grown = (_tokens(each) for each in (turns, write_turns(whole, play)))
    return (
        f"policy.prompt={block.prompt} with history {dialogue.wording.history}: each turn is a row of its "
        f"own; {len(turns)} random turns have {anew:,} tokens, as one dialogue {grown:,} "
        f"({anew / grown:.1f} times)"
    )


def _tokens(turns: Sequence[PromptTurn]) -> int:
    return sum(len(turn.prompt) + len(turn.reply) for turn in turns)


def _reply_room(config: RunConfig, dialogue: Dialogue, request: ActionRequest) -> int:
    """Return the number of tokens that the reply to a request may take."""
    free = not config.rollout.constrained or not request.actions
    if free or getattr(dialogue, "thinking", None) is not None:
        return config.engine.max_tokens
    own = dialogue.for_episode(request.briefing)
    return max(len(own.encode_reply(action)) for action in request.actions or ())
