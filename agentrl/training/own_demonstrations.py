"""Demonstrations that are not played: the user's own data, in the tokens of the policy."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from agentrl.data.conversations import Conversation
from agentrl.data.trajectory import Episode, StopReason
from agentrl.errors import ConfigError
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.transcripts import Transcriber, learned_turns
from agentrl.run.folder import open_run
from agentrl.run.own_data import (
    OwnData,
    as_conversation,
    check_unchanged,
    dialogue_of,
    has_same_words,
    read_own_data,
)
from agentrl.training.setup import Session

_MAX_FAULTS = 5  # rows that an error names


def own_demonstrations(session: Session, say: Callable[[str], None]) -> list[Episode]:
    """Return the episodes of `warm_start.data` and `warm_start.from`, and say what each of them holds.

    Episodes that do not fit the policy's context are left out.

    Raises:
        ConfigError: A row cannot be read or written, or too few are left.
        CheckpointError: The data has changed since the run began.
    """
    config = session.config
    check_unchanged(session.run)
    panels = [(env, session.panels[env.label]) for env in config.environments]
    apart = [p for env, p in panels if config.evaluation.panel is not None or p.split != env.split]
    sources = read_own_data(config, {(panel.env, task) for panel in apart for task in panel.tasks})
    policy = session.policy
    transcriber = Transcriber(policy.dialogue, policy.tokenizer, config.policy)
    found, faults = [], []
    for source in sources:
        episodes, lines, wrong = _written(source, session, transcriber)
        found += episodes
        faults += wrong
        say(lines)
    if faults:
        more = ["more rows are like these"] * (len(faults) > _MAX_FAULTS)
        raise ConfigError("\n".join([*faults[:_MAX_FAULTS], *more]))
    block = config.warm_start
    if len(found) < block.batch_size:
        raise ConfigError(
            f"{block.own_data}: {len(found)} episodes are left to clone, wanted at least "
            f"warm_start.batch_size ({block.batch_size})"
        )
    return found


def _written(
    source: OwnData, session: Session, transcriber: Transcriber
) -> tuple[list[Episode], str, list[str]]:
    """Return the episodes of a source in tokens, a line that describes them, and what was wrong."""
    config, policy, left_out = session.config, session.policy, source.left_out
    kept = source.run is not None and has_same_words(source.run, policy, config)
    reader = None if kept else _writer_of(source, session)
    found: list[Episode] = []
    faults: list[str] = []
    own = 0
    for number, row in enumerate(source.rows):
        if isinstance(row, Episode) and kept:
            episode = _as_stored(row)
        else:
            place = f"{source.name}, {row.id}" if isinstance(row, Episode) else row.place
            text = as_conversation(row, place, reader) if isinstance(row, Episode) else row
            try:
                episode = _episode(f"own-{number}", text, transcriber)
            except ConfigError as error:
                faults.append(str(error))
                continue
            own += not text.played and transcriber.is_own(text)
        if not episode.turns:
            left_out["with no reply to learn from"] += 1
        elif config.policy.max_context is not None and episode.longest_sequence > config.policy.max_context:
            left_out[f"longer than policy.max_context={config.policy.max_context}"] += 1
        else:
            found.append(episode)
    return found, _describe(source, found, _manner(source, own, kept=kept)), faults


def _writer_of(source: OwnData, session: Session) -> Dialogue | None:
    """Return the dialogue to read whole replies of a run with, where they hold more than a command."""
    asked = session.config.policy.reply
    if source.run is None or asked not in ("think_action", "subgoal_action"):
        return None
    run = open_run(source.run)
    return dialogue_of(run) if run.config.policy.reply == asked else None


def _as_stored(episode: Episode) -> Episode:
    """Return an episode whose token ids are the policy's, as a demonstration."""
    turns = [
        replace(turn, trainable=turn.trainable and turn.valid, temperature=None, temperatures=())
        for turn in episode.turns
    ]
    return replace(episode, turns=learned_turns(turns), parent=None)


def _episode(id: str, text: Conversation, transcriber: Transcriber) -> Episode:
    return Episode(
        id=id,
        env=text.env or "",
        task=text.task or id,
        seed=0,
        turns=transcriber.turns(text),
        stop=StopReason.TERMINATED,
        success=text.success is not False,
        task_type=text.task_type,
    )


def _manner(source: OwnData, own: int, *, kept: bool) -> str:
    """Say how the rows of a source were written."""
    if kept:
        return "with their own tokens"
    if any(isinstance(row, Episode) or row.played for row in source.rows):
        return "in the policy's prompts"
    if own == len(source.rows):
        return "in the policy's prompts"
    if own:
        return f"{own} in the policy's prompts and the others as they are"
    return "as they are, not in the policy's prompts"


def _describe(source: OwnData, episodes: list[Episode], manner: str) -> str:
    turns = [turn for episode in episodes for turn in episode.turns]
    learned = sum(turn.trainable for turn in turns)
    tasks = Counter(episode.task for episode in episodes)
    line = (
        f"{source.name}: {source.kind}, {manner}: {len(episodes):,} episodes of {len(tasks):,} tasks, "
        f"{learned:,} replies to learn from"
    )
    if learned < len(turns):
        line += f" and {len(turns) - learned:,} that are context"
    reasons = [f"{count:,} {reason}" for reason, count in source.left_out.items()]
    return f"{line}; left out: {', '.join(reasons) or 'none'}"
