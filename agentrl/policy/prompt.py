"""Prompt templates: what the user's message of a turn says, in Jinja; does not import torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Self

from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentrl.env.briefing import Briefing
from agentrl.errors import ConfigError

PLAIN = "plain"
_FOLDER = Path(__file__).parent / "prompts"
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
# What a template can use, and what each stands for.
VARIABLES = {
    "task": "the text of the task",
    "observation": "the observation of this turn",
    "actions": "the admissible actions as a list, empty if the environment names none",
    "history": "the last turns, each with .number, .observation, .action and .reply",
    "step": "the number of steps taken",
    "max_steps": "the largest number of steps, or none",
    "instructions": "the environment's instructions, or empty text",
    "reply_instructions": "what policy.reply asks for",
    "examples": "solved examples, each with .task and .turns",
    "begins": "whether the message begins a prompt, rather than continues a dialogue",
}
# Around text from outside in a rendered message. Unicode keeps these two for such use inside a program.
_START, _END = "\ufdd0", "\ufdd1"
_MARKS = str.maketrans("", "", _START + _END)
_OUTSIDE = re.compile(f"{_START}(.*?){_END}", re.DOTALL)
_HISTORY = re.compile(r"{#-?\s*history:\s*(full|none|\d{1,4})\s*-?#}")

Piece = tuple[str, bool]  # text, and whether it is the template's own: only its tags may become tokens
Cut = Callable[[str], str]


class Observation(str):
    """An observation, with what else a prompt may show at its turn.

    A dialogue that shows the text alone takes any `str`.

    Attributes:
        actions: The admissible actions; None if the environment does not name them.
        briefing: What the environment told at the start of the episode.
    """

    actions: tuple[str, ...] | None
    briefing: Briefing

    def __new__(
        cls, text: str, actions: tuple[str, ...] | None = None, briefing: Briefing | None = None
    ) -> Self:
        """Make the text, and add what came with it."""
        self = super().__new__(cls, text)
        self.actions, self.briefing = actions, briefing or Briefing()
        return self


def task_of(observation: str) -> str | None:
    """Return the task that the environment names for an observation's episode; None if it names none."""
    return observation.briefing.task if isinstance(observation, Observation) else None


@dataclass(frozen=True, slots=True)
class Example:
    """A solved task: the text of the task, and the (observation, action) of its turns.

    An example with the id of an environment is shown in that environment only.
    """

    task: str
    turns: tuple[tuple[str, str], ...]
    env: str | None = None


@dataclass(frozen=True, slots=True)
class ReplyWords:
    """Texts of a reply format: the instructions for a reply, and the text around its command.

    In a format in which these depend on the command, `write` returns the text before it, the command as it is
    written, and the text after it.
    """

    asks: str
    before: str = ""
    after: str = ""
    write: Callable[[str], tuple[str, str, str]] | None = None

    def around(self, command: str) -> tuple[str, str, str]:
        """Return the text before a command, the command as it is written, and the text after it."""
        return (self.before, command, self.after) if self.write is None else self.write(command)


class _Marked(str):
    """Text of our own, in which text from outside is marked already."""

    __slots__ = ()


def _finalize(value: Any) -> str:
    """Mark what a template prints as text from outside."""
    if isinstance(value, _Marked | Undefined):
        return str(value)  # of something undefined: an error that names it
    return f"{_START}{str(value).translate(_MARKS)}{_END}"


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn as templates see it; `reply` is the action as the reply format writes it."""

    number: int
    observation: str
    action: str
    reply: _Marked


@dataclass(frozen=True)
class PromptTemplate:
    """A template of the user's message of a turn.

    Args:
        name: The name or the file that the configuration gives.
        source: The template's text.
        history: The number of earlier turns that a message shows, each message beginning a prompt of its own;
            None continues the dialogue.
        examples: The solved examples that it can show.
    """

    name: str
    source: str
    history: int | None
    examples: tuple[Example, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined,
            finalize=_finalize,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        try:
            parsed = environment.parse(self.source)
            used = meta.find_undeclared_variables(parsed)
            compiled = environment.from_string(self.source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            where = f"{self.name}, line {line}" if line else self.name
            raise ConfigError(f"policy.prompt {where}: not valid Jinja ({error})") from error
        for name in sorted(used - environment.globals.keys() - VARIABLES.keys()):
            raise ConfigError(
                f"policy.prompt {self.name}: unknown variable {name!r}, wanted one of {', '.join(VARIABLES)}"
            )
        object.__setattr__(self, "used", frozenset(used))
        object.__setattr__(self, "_compiled", compiled)

    used: frozenset[str] = field(init=False, repr=False, compare=False)
    _compiled: Any = field(init=False, repr=False, compare=False)

    def write(
        self,
        past: Sequence[tuple[str, str]],
        observation: str,
        reply: ReplyWords,
        cut: Cut = str,
    ) -> tuple[Piece, ...]:
        """Return the message of a turn in pieces.

        Args:
            past: The (observation, action) of the turns so far.
            observation: The observation to reply to.
            reply: The words of the reply format.
            cut: Shortens an observation, or an action of a past turn, that is too long.
        """
        seen = observation if isinstance(observation, Observation) else Observation(observation)
        briefing, step = seen.briefing, len(past)
        first = past[0][0] if past else observation
        shown = 0 if self.history is None else min(self.history, step)
        turns = [
            _turn(number, text, action, reply, cut)
            for number, (text, action) in enumerate(past, start=1)
            if number > step - shown
        ]
        variables = {
            "task": cut(str(first)) if briefing.task is None else briefing.task,
            "observation": cut(str(observation)),
            "actions": briefing.list_actions(seen.actions or ()),
            "history": turns,
            "step": step,
            "max_steps": briefing.max_steps,
            "instructions": briefing.instructions,
            "reply_instructions": _Marked(reply.asks.translate(_MARKS)),
            "examples": [
                {
                    "task": example.task,
                    "turns": [
                        _turn(number, text, action, reply, cut)
                        for number, (text, action) in enumerate(example.turns, start=1)
                    ],
                }
                for example in self.examples
                if example.env in (None, briefing.env)
            ],
            "begins": self.history is not None or not past,
        }
        try:
            return tuple(_pieces(self._compiled.render(variables)))
        except Exception as error:  # whatever a template can do wrong
            raise ConfigError(f"policy.prompt {self.name}: {type(error).__name__}: {error}") from error

    def check(self, reply: ReplyWords) -> None:
        """Render the template in the situations it may meet.

        Raises:
            ConfigError: If it fails in one of them.
        """
        example = Example("a task", (("an observation", "an action"),) * 2)
        probed = PromptTemplate(self.name, self.source, self.history, (example,) * bool(self.examples))
        for turns, actions, known in product((0, 1, 5), ((), ("go", "stay")), (False, True)):
            briefing = Briefing("a task", "Act.", {}, 9) if known else Briefing()
            past = [("an observation", "an action")] * turns
            probed.write(past, Observation("an observation", actions, briefing), reply)


def _turn(number: int, observation: str, action: str, reply: ReplyWords, cut: Cut) -> _Turn:
    said = cut(action)
    before, written, after = reply.around(said)
    marked = _Marked(f"{before}{_START}{written.translate(_MARKS)}{_END}{after}")
    return _Turn(number, cut(str(observation)), said, marked)


def _pieces(rendered: str) -> Iterator[Piece]:
    """Split a rendered message at its marks.

    >>> list(_pieces(f"You see {_START}a mug{_END}."))
    [('You see ', True), ('a mug', False), ('.', True)]
    """
    for place, text in enumerate(_OUTSIDE.split(rendered)):
        if text:
            yield text, place % 2 == 0


def load_prompt(
    name: str, history: int | str | None = None, examples: Sequence[Example] = ()
) -> PromptTemplate | None:
    """Return the template of a configuration; None for `plain` with the whole dialogue.

    Args:
        name: The name of a template that agentrl ships, or a file.
        history: full, none or a number of turns; None takes what the template says of itself, else full.
        examples: The solved examples.

    Raises:
        ConfigError: If there is no such template, or it cannot be used.
    """
    if name in SHIPPED:
        path = _FOLDER / f"{name}.jinja"
    else:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(
                f"policy.prompt is {name!r}, wanted {', '.join(SHIPPED)} or the path of a Jinja template; "
                "there is no such file"
            )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy.prompt {name}: cannot be read ({error})") from error
    declared = _HISTORY.search(source)
    wanted = history if history is not None else declared[1] if declared else "full"
    turns = {"full": None, "none": 0}[wanted] if wanted in ("full", "none") else int(wanted)
    return None if name == PLAIN and turns is None else PromptTemplate(name, source, turns, tuple(examples))
