"""Data of the user's own to clone: the files of `warm_start.data`, and the run of `warm_start.from`."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentrl.data.conversations import MAX_BYTES, Conversation, Exchange, read_conversations
from agentrl.data.storage import read_episodes, unpacked_bytes
from agentrl.data.trajectory import Episode
from agentrl.env.names import split_task
from agentrl.errors import AgentRLError, CheckpointError, ConfigError
from agentrl.files import write_atomic
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.tokens import configured_dialogue, fingerprint
from agentrl.run.folder import Run, find_run, open_run
from agentrl.run.policies import Policy
from agentrl.run.records import read_manifest
from agentrl.run.settings import RunConfig
from agentrl.run.weights import tokenizer_of

TRAINING = "train-*.parquet"  # the names of stored training episodes; the others are evaluations
EPISODES = "episodes of agentrl"
_RECORD = "warm_start_data"


@dataclass(frozen=True)
class OwnData:
    """Demonstrations from a file, or from the stored episodes of a run.

    Args:
        name: The key and the file or run, for messages.
        kind: The kind of its rows.
        rows: The conversations or episodes to learn from.
        left_out: The number of rows that are not, by reason.
        run: The run of `warm_start.from`; None of a file.
    """

    name: str
    kind: str
    rows: Sequence[Conversation | Episode]
    left_out: Counter[str]
    run: Path | None = None


def read_own_data(config: RunConfig, evaluated: Collection[tuple[str, str]] = ()) -> list[OwnData]:
    """Read what a configuration names to clone in place of the environment's expert.

    Args:
        config: The configuration.
        evaluated: The environments' ids and tasks that are evaluated on, which are left out.

    Raises:
        ConfigError: A file or a run cannot be read; broken rows are named by file and line.
    """
    block = config.warm_start
    found = []
    for name in block.files:
        path = Path(name)
        try:
            kind, rows = (EPISODES, _stored(path)) if _is_parquet(path) else read_conversations(path)
        except AgentRLError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"warm_start.data: {line}" for line in lines)) from error
        found.append(_sifted(f"warm_start.data={name}", kind, rows, config, evaluated))
    if block.from_ is not None:
        run = _source_run(block.from_)
        episodes = [episode for path in stored_files(run) for episode in _stored(path)]
        name = f"warm_start.from={block.from_}"
        found.append(_sifted(name, EPISODES, episodes, config, evaluated, run))
    return found


def stored_files(run: Path, pattern: str = TRAINING) -> list[Path]:
    """Return the files of a run's stored episodes, in the order of their names."""
    return sorted((run / "episodes").glob(pattern))


def check_unchanged(run: Run) -> None:
    """Record the hashes of the data that a run clones in its manifest, or compare them with the record.

    Raises:
        CheckpointError: A file has changed since, or is gone or new.
    """
    block, manifest = run.config.warm_start, read_manifest(run.folder)
    source = [] if block.from_ is None else stored_files(_source_run(block.from_))
    now = {str(path): _sha256(path) for path in [*map(Path, block.files), *source]}
    before = (manifest or {}).get(_RECORD)
    if manifest is not None and before is None:
        write_atomic(run.folder / "manifest.json", json.dumps(manifest | {_RECORD: now}, indent=1))
    elif before is not None and before != now:
        changed = next(path for path in {**before, **now} if before.get(path) != now.get(path))
        what = "is new" if changed not in before else "is gone" if changed not in now else "has changed"
        raise CheckpointError(
            f"{changed}: {what} since {run.folder} began to clone it, and the rest of its warm start would "
            "learn from other data; restore it, or start a new run"
        )


def has_same_words(run: Path, policy: Policy, config: RunConfig) -> bool:
    """Return whether a run's token ids are those that a policy would read and write for the same texts."""
    try:
        stored = open_run(run)
        tokenizer, manifest = tokenizer_of(stored), read_manifest(run) or {}
    except AgentRLError:
        return False
    now, before, wording = config.policy, stored.config.policy, policy.dialogue.wording
    recorded = manifest.get("prompt") or {}
    return (
        fingerprint(tokenizer) == fingerprint(policy.tokenizer)
        and recorded.get("sha256") == wording.sha256
        and recorded.get("template_sha256") == wording.template_sha256
        and (before.reply, before.max_observation_tokens) == (now.reply, now.max_observation_tokens)
    )


def dialogue_of(run: Run) -> Dialogue:
    """Return the dialogue in which a run's episodes were read and written."""
    return configured_dialogue(run.config.policy, tokenizer_of(run))


def as_conversation(episode: Episode, place: str, written_by: Dialogue | None = None) -> Conversation:
    """Return an episode as text.

    Args:
        episode: The episode.
        place: Where it stands.
        written_by: The dialogue of its policy, to take whole replies from; None takes their commands.
    """
    return Conversation(
        place,
        tuple(
            Exchange(
                turn.observation,
                turn.action if written_by is None else written_by.reply_text(turn.action_ids),
                turn.trainable and turn.valid,
            )
            for turn in episode.turns
        ),
        played=True,
        written=written_by is not None,
        env=episode.env,
        task=episode.task,
        task_type=episode.task_type,
        success=episode.success,
        episode_return=episode.episode_return,
    )


def _source_run(name: str) -> Path:
    """Return the folder of the run of `warm_start.from`, which has stored training episodes."""
    try:
        folder = find_run(name)
    except CheckpointError as error:
        raise ConfigError(f"warm_start.from: {error}") from error
    if not stored_files(folder):
        raise ConfigError(
            f"warm_start.from is {name!r}, but {folder / 'episodes'} has no {TRAINING}; wanted a run with "
            "trainer.save_episodes_every above 0"
        )
    return folder


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as opened:
            return opened.read(4) == b"PAR1"
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _stored(path: Path) -> list[Episode]:
    if (size := unpacked_bytes(path)) > MAX_BYTES:
        raise ConfigError(f"{path}: unpacks to {size:,} bytes, wanted at most {MAX_BYTES:,}; split it")
    return read_episodes(path)


def _sifted(
    name: str,
    kind: str,
    rows: Sequence[Conversation | Episode],
    config: RunConfig,
    evaluated: Collection[tuple[str, str]],
    run: Path | None = None,
) -> OwnData:
    """Leave out the rows that are not to be learned from; of a run's, equal ones too."""
    kept: list[Conversation | Episode] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[object, ...]] = set()
    panels = frozenset(evaluated) | {(None, task) for _, task in evaluated}
    for row in rows:
        if isinstance(row, Episode) and (row.stop.aborted or not row.turns):
            left_out["aborted"] += 1
        elif config.warm_start.only_successes and row.success is False:
            left_out["not successful"] += 1
        elif row.task is not None and {(row.env, row.task), (row.env, split_task(row.task)[1])} & panels:
            left_out["of tasks that are evaluated on"] += 1
        elif isinstance(row, Episode) and run is not None and (same := _content(row)) in seen:
            left_out["equal to another"] += 1
        else:
            if isinstance(row, Episode) and run is not None:
                seen.add(same)
            kept.append(row)
    return OwnData(name, kind, kept, left_out, run)


def _content(episode: Episode) -> tuple[object, ...]:
    """Return what two episodes have in common if one of them teaches nothing new."""
    replies = tuple((turn.observation, turn.action, turn.action_ids) for turn in episode.turns)
    return (episode.env, episode.task, replies)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
