"""Parse a `.twl2` grammar: the command and the feedback of every action, and the rules that write them.

A text consists of literal characters, `#rule#`, `{expression | query}` (the results one after another) and
`[{expression | query}]` (the results as a list with commas). A query `p(x:type) & q(x:type, y:type)` is
matched against the facts from left to right.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from agentrl_envs.alfworld.pddl import GameFileError

Placeholder = tuple[str, str]  # name and type
Bound = tuple[Placeholder, ...]


class GrammarError(GameFileError):
    """The text grammar of a game is malformed or uses an unsupported feature."""


class Alternative(NamedTuple):
    """One alternative of a rule; used if its condition holds and that of no earlier alternative does."""

    condition: str
    text: str


class ActionText(NamedTuple):
    """The command that a player types for an action, and the feedback to it."""

    command: str
    feedback: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """The declarations of a `.twl2` text."""

    actions: dict[str, ActionText]
    rules: dict[str, tuple[Alternative, ...]]


_BLANK = r"(?:\s++|\#[^\n]*+)*+"
_OUTSIDE = re.compile(
    _BLANK + r"""(?:action\s+(?P<action>[\w/-]+)\s*\{|(?P<grammar>grammar)\s*::\s*\"\"\"|(?P<end>\Z))""",
    re.VERBOSE,
)
_INSIDE = re.compile(
    _BLANK
    + r"""(?:(?P<block>grammar|pddl)\s*::\s*\"\"\"|(?P<name>template|feedback)\s*::\s*"(?P<text>[^"]*)"\s*;
    |(?P<close>\}))""",
    re.VERBOSE,
)
_BLOCK_END = re.compile(r"\s*;")


def parse_grammar(text: str) -> Grammar:
    """Parse a `.twl2` text.

    Raises:
        GrammarError: The text is malformed; the message names the line.
    """
    actions: dict[str, ActionText] = {}
    rules: dict[str, tuple[Alternative, ...]] = {}
    place = 0
    while True:
        match = _expect(_OUTSIDE, text, place)
        if match["action"] is not None:
            place = _read_action(text, match, actions, rules)
        elif match["grammar"] is not None:
            block, place = _block(text, match.end())
            rules.update(_read_rules(block, False))
        else:
            return Grammar(actions, rules)


def _read_action(
    text: str,
    opening: re.Match[str],
    actions: dict[str, ActionText],
    rules: dict[str, tuple[Alternative, ...]],
) -> int:
    name, place, found = opening["action"].lower(), opening.end(), dict[str, str]()
    while True:
        match = _expect(_INSIDE, text, place)
        place = match.end()
        if match["block"] is not None:
            block, place = _block(text, place)
            if match["block"] == "grammar":
                rules.update(_read_rules(block, True))
        elif match["name"] is not None:
            found[match["name"]] = match["text"]
        else:
            break
    if found.keys() != {"template", "feedback"}:
        raise GrammarError(f"action {name} of the text grammar needs a template and a feedback")
    actions[name] = ActionText(found["template"], found["feedback"])
    return place


def _expect(pattern: re.Pattern[str], text: str, place: int) -> re.Match[str]:
    match = pattern.match(text, place)
    if match is None:
        line = text.count("\n", 0, place) + 1
        raise GrammarError(f"the text grammar is malformed after line {line}: {text[place : place + 60]!r}")
    return match


def _block(text: str, place: int) -> tuple[str, int]:
    """Read a block up to the three quotes and the semicolon that end it."""
    end = text.find('"""', place)
    closing = _BLOCK_END.match(text, end + 3) if end >= 0 else None
    if closing is None:
        raise GrammarError(f"a block of the text grammar is not closed: {text[place : place + 60]!r}")
    return text[place:end], closing.end()


@lru_cache(maxsize=256)
def _read_rules(block: str, in_action: bool) -> dict[str, tuple[Alternative, ...]]:
    if in_action:
        block = "\n".join(line for line in block.split("\n") if not line.lstrip().startswith("#"))
    try:
        data = json.loads(block)
        return {
            name: tuple(Alternative(item.get("condition", ""), item["rhs"]) for item in items)
            for name, items in data.items()
        }
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise GrammarError(f"a grammar block is not JSON of rules with 'rhs': {error!r}") from error


class Part(NamedTuple):
    """A part of a text: its kind is literal, rule, repeat or list; the last two iterate over `query`."""

    kind: str
    content: str
    is_rule: bool = False
    query: str = ""


_STATEMENT = r"[^|\[\]{}\n<>]+"
_TAG = r"\#\t*+[\w()/!<>\-\s,.]+\#"
_BRACES = (
    rf"\{{\t*+(?>(?P<tag>{_TAG})|(?P<code>{_STATEMENT}))\t*(?:\s*\|\s*(?P<query>[^;|{{}}\n\[\]\#]+))?\}}"
)
_PART = re.compile(
    rf"""\[\t*{_BRACES}\t*\]|{_BRACES.replace("?P<", "?P<bare_")}|(?P<rule>{_TAG})
        |"(?P<quoted>[^;|"<>\[\]\#{{}}]*)"|(?P<literal>[^;|"<>\[\]\#{{}}]+)""",
    re.VERBOSE,
)
_SKIPPED = re.compile(r"(?://.*|\s+)\n?|\t+")


@lru_cache(maxsize=4096)
def split_text(text: str) -> tuple[Part, ...]:
    """Split a text into its parts; text after the first character that fits no part is dropped."""
    parts: list[Part] = []
    place = 0
    while True:
        place = _skip(text, place)
        match = _PART.match(text, place)
        if match is None or match.end() == place:
            return tuple(parts)
        place = match.end()
        parts.append(_part(match))


def _skip(text: str, place: int) -> int:
    """Skip tabs, and at the start of a line also white space and `//` comments."""
    while place < len(text):
        at_start = place == 0 or text[place - 1] == "\n"
        match = (_SKIPPED if at_start else _TABS).match(text, place)
        if match is None:
            break
        place = match.end()
    return place


_TABS = re.compile(r"\t+")


def _part(match: re.Match[str]) -> Part:
    found = match.groupdict()
    if found["rule"] is not None:
        return Part("rule", found["rule"][1:-1].lstrip("\t"))
    if found["literal"] is not None or found["quoted"] is not None:
        return Part("literal", found["literal"] if found["literal"] is not None else found["quoted"])
    kind, prefix = ("list", "") if match[0].startswith("[") else ("repeat", "bare_")
    tag, code, query = (found[prefix + name] for name in ("tag", "code", "query"))
    return Part(kind, tag[1:-1].lstrip("\t") if tag else code, tag is not None, (query or "").strip())


_QUERY_ATOM = re.compile(r"\s*([\w/!]+)\s*\(([^()]*)\)\s*")


@lru_cache(maxsize=1024)
def parse_query(text: str) -> tuple[tuple[str, Bound], ...]:
    """Parse `p(x:type) & q(..)` into ((p, ((x, type),)), …)."""
    atoms = []
    for piece in text.split("&"):
        match = _QUERY_ATOM.fullmatch(piece)
        if match is None:
            raise GrammarError(f"{piece!r} is not an atom of a query, in {text!r}")
        arguments = []
        for item in filter(None, (item.strip() for item in match[2].split(","))):
            name, _, kind = (part.strip() for part in item.partition(":"))
            arguments.append((name, kind or name))
        atoms.append((match[1], tuple(arguments)))
    return tuple(atoms)
