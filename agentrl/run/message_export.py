"""Write a run's stored episodes as chat messages, for other programs and for `warm_start.data`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import Episode
from agentrl.errors import CheckpointError, ConfigError
from agentrl.files import replacing
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.transcripts import conversations_of
from agentrl.run.folder import open_run
from agentrl.run.own_data import dialogue_of, stored_files


@dataclass(frozen=True)
class Exported:
    """Numbers of what was written: files that were read, their episodes, those written, and rows."""

    files: int
    episodes: int
    written: int
    rows: int


def export_messages(
    name: str | Path, to: Path, *, successes: bool = False, pattern: str = "train-*"
) -> Exported:
    """Write stored episodes as JSON Lines, a conversation in each, which `datasets` loads as "json".

    Where every prompt was written anew (`policy.history`), each turn is a conversation.

    Args:
        name: The folder or name of the run.
        to: The file to write, which must not exist.
        successes: Whether to leave out episodes that did not succeed.
        pattern: The names of the files in RUN/episodes, without their suffix.

    Raises:
        ConfigError: The file exists.
        CheckpointError: The run has no such episodes, or they cannot be read or written.
    """
    if to.exists() or to.is_symlink():
        raise ConfigError(f"--to {to}: exists; choose a new file")
    if not to.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no folder {to.parent}")
    run = open_run(name)
    files = stored_files(run.folder, f"{pattern}.parquet")
    if not files:
        raise CheckpointError(
            f"{run.folder / 'episodes'}: has no {pattern}.parquet; training stores episodes every "
            "trainer.save_episodes_every steps"
        )
    dialogue = dialogue_of(run)
    episodes = written = rows = 0
    with replacing(to) as partial, partial.open("w", encoding="utf-8") as file:
        for path in files:
            for episode in read_episodes(path):
                episodes += 1
                if not episode.turns or (successes and not episode.success):
                    continue
                written += 1
                for row in _rows(path, episode, dialogue):
                    rows += 1
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Exported(len(files), episodes, written, rows)


def _rows(path: Path, episode: Episode, dialogue: Dialogue) -> Iterator[dict[str, Any]]:
    try:
        conversations = conversations_of(dialogue, episode.turns)
    except ConfigError as error:
        raise CheckpointError(f"{path}, {episode.id}: {error}") from error
    system = dialogue.system_message
    opening = [] if system is None else [{"role": "system", "content": system, "loss": None}]
    for number, exchanges in enumerate(conversations):
        messages: list[dict[str, Any]] = [*opening]
        for exchange in exchanges:
            messages += [
                {"role": "user", "content": exchange.said, "loss": None},
                {"role": "assistant", "content": exchange.reply, "loss": exchange.learned},
            ]
        yield {
            "messages": messages,
            "env": episode.env,
            "task": episode.task,
            "task_type": episode.task_type,
            "success": episode.success,
            "return": episode.episode_return,
            "turns": len(exchanges),
            "first_turn": number if dialogue.starts_anew else 0,
            "stop": episode.stop.value,
            "seed": episode.seed,
            "episode": f"{path.stem}/{episode.id}",
        }
