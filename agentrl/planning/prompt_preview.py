"""Preview the prompts of an episode, and count their tokens."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from rich.console import Group
from rich.rule import Rule
from transformers import PreTrainedTokenizerBase

from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.planning.prompt_probe import record_play, write_turns
from agentrl.policy.dialogue import Dialogue
from agentrl.policy.encoding import special_ids
from agentrl.policy.model import load_tokenizer
from agentrl.policy.sources import resolve
from agentrl.policy.tokens import configured_dialogue, fit_tokenizer
from agentrl.rollout.players import scripted_player
from agentrl.run.env_backend import environment_factory, open_one_environment
from agentrl.run.examples import find_examples
from agentrl.run.policies import check_fitted
from agentrl.run.settings import RunConfig
from agentrl.terminal import plain

_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "model": "green", "token": "dim"}


@dataclass(frozen=True)
class PreviewTurn:
    """One turn of a preview.

    Args:
        turn: The number of the turn, from 1.
        prompt: The text that is added before the reply, or all of it where it begins a sequence.
        prompt_tokens: The number of its tokens.
        begins: Whether it begins a sequence.
        cut: Whether the observation is cut.
        reply: The text of the reply.
        reply_tokens: The number of its tokens.
        sequence_tokens: The number of tokens of the sequence, with the reply.
    """

    turn: int
    prompt: str
    prompt_tokens: int
    begins: bool
    cut: bool
    reply: str
    reply_tokens: int
    sequence_tokens: int


@dataclass(frozen=True)
class Preview:
    """The prompts of the first turns of an episode.

    Args:
        env: The environment, by its id or its name among several.
        prompt: The value of `policy.prompt`.
        history: The number of turns that a prompt shows; None for one growing dialogue.
        sha256: The hash of the fixed text of prompts, as a run records it.
        task: The id of the task.
        player: Whose commands were played: `expert` or `random`.
        special: The tokens that are markup.
        turns: The turns.
    """

    env: str
    prompt: str
    history: int | None
    sha256: str
    task: str
    player: str
    special: tuple[str, ...]
    turns: tuple[PreviewTurn, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the preview as JSON values."""
        return asdict(self)


def preview_prompts(config: RunConfig, *, turns: int = 3, task: str | None = None) -> Preview:
    """Return what the policy of a configuration would read in the first turns of an episode.

    The environment's expert plays, or chance where there is none. No weights are loaded.

    Args:
        config: The configuration, with one environment.
        turns: The largest number of turns.
        task: The id of the task; None takes the first training task.

    Raises:
        AgentRLError: If the configuration or the environment cannot be used.
    """
    block = config.policy
    if block.path is None:
        check_fitted(block)
    examples = find_examples(config)
    play, player = _play(config, task, turns)
    if play.stop.aborted:
        raise ConfigError(f"env: the episode was aborted ({play.stop.value}): {play.error}")
    if block.path is None:
        tokenizer = _fitted(config, play)
    else:
        source = resolve(block.path, block.revision, weights=False)
        tokenizer = load_tokenizer(source, block.chat_template)
    dialogue = configured_dialogue(block, tokenizer, examples=examples)
    written = [
        PreviewTurn(
            number,
            _decode(tokenizer, turn.prompt),
            len(turn.prompt),
            turn.begins,
            turn.cut,
            _decode(tokenizer, turn.reply),
            len(turn.reply),
            turn.length,
        )
        for number, turn in enumerate(write_turns(dialogue, play), start=1)
    ]
    return Preview(
        config.only_env.label,
        block.prompt,
        dialogue.wording.history,
        dialogue.wording.sha256,
        play.task,
        player,
        tuple(sorted(_markup(tokenizer, dialogue))),
        tuple(written),
    )


def _play(config: RunConfig, task: str | None, turns: int) -> tuple[Episode, str]:
    """Play an episode by the expert, or by chance where the environment has none."""
    for name in ("expert", "random"):
        factory = environment_factory(config, **({"expert": True} if name == "expert" else {}))
        try:
            with open_one_environment(factory, config.rollout) as environments:
                with environments.borrow() as environment:
                    known: Any = environment.unwrapped
                    chosen = known.tasks(config.only_env.split)[0] if task is None else task
                    known.task_hash(chosen)  # refuses an unknown one
                return record_play(config, environments, chosen, scripted_player(name), turns), name
        except ConfigError:
            if name == "random":
                raise  # whatever is wrong, the expert is not
    raise AssertionError


def _fitted(config: RunConfig, play: Episode) -> PreTrainedTokenizerBase:
    texts = [text for turn in play.turns for text in (turn.observation, turn.action)]
    return fit_tokenizer(texts, config.policy.vocab_size)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)


def _markup(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> set[str]:
    ids = special_ids(tokenizer) | dialogue.stop_ids
    return {cast(str, tokenizer.convert_ids_to_tokens(id)) for id in ids}


def preview_text(preview: Preview) -> Group:
    """Return a preview for the terminal: markup dim, and each role in its colour."""
    how = "one growing dialogue" if preview.history is None else f"written anew, history {preview.history}"
    head = (
        f"policy.prompt={preview.prompt} ({how}), sha256 {preview.sha256[:12]}; {preview.env}, task "
        f"{preview.task}, "
        f"played by {'its expert' if preview.player == 'expert' else 'chance'}"
    )
    shown: list[Any] = [plain(head, "bold")]
    for turn in preview.turns:
        kind = "new sequence" if turn.begins else "continued"
        cut = ", observation cut" if turn.cut else ""
        title = (
            f"turn {turn.turn}: {turn.prompt_tokens:,} tokens, {kind}{cut}; reply {turn.reply_tokens:,}; "
            f"sequence {turn.sequence_tokens:,}"
        )
        prompt = plain("")
        for text, role in _roles(turn.prompt, preview.special):
            prompt.append_text(plain(text, _STYLES.get(role, "")))
        prompt.append_text(plain(turn.reply, "bold"))
        shown += [Rule(title, align="left", style="dim"), prompt]
    return Group(*shown)


def _roles(text: str, special: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Split a prompt at its markup tokens; a role is the word after one, as most chat templates have it."""
    role = ""
    tokens = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    for place, part in enumerate(re.split(f"({tokens})", text)):
        if place % 2:
            yield part, "token"
        elif part:
            named = re.match(r"(system|user|assistant|model|tool)\b", part)
            role = named[1] if named else role
            yield part, role
