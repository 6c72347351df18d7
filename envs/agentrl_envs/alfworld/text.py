"""Read a `.twl2` grammar: the command and the feedback of every action, and the rules that write them.

A text is literal characters, `#rule#`, `{expression | query}` (one result after another) and `[{expression | query}]` (a list
with commas). A query `p(x:type) & q(x:type, y:type)` is matched against the facts, left to right.
"""

import ast
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from agentrl_envs.alfworld.joins import Code, Schema, Tables
from agentrl_envs.alfworld.pddl import Atom, GameFileError, PddlError

Placeholder = tuple[str, str]  # name and type
Bound = tuple[Placeholder, ...]


class GrammarError(GameFileError):
    """The text grammar of a game is malformed, or uses something that is not supported."""


class Alternative(NamedTuple):
    """One way to write a rule; used when its condition holds and no earlier one's did."""

    condition: str
    text: str


class ActionText(NamedTuple):
    """How an action is typed by the player, and what answers it."""

    command: str
    feedback: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a `.twl2` text declares."""

    actions: dict[str, ActionText]
    rules: dict[str, tuple[Alternative, ...]]


_ITEM = re.compile(
    r"""(?:\s++|\#[^\n]*+)*+(?:
        action\s+(?P<action>[\w/-]+)\s*\{
        |grammar\s*::\s*\"\"\"(?P<grammar>.*?)\"\"\"\s*;
        |template\s*::\s*"(?P<template>[^"]*)"\s*;
        |feedback\s*::\s*"(?P<feedback>[^"]*)"\s*;
        |pddl\s*::\s*\"\"\".*?\"\"\"\s*;
        |(?P<close>\})
        |(?P<end>\Z))""",
    re.VERBOSE | re.DOTALL,
)


def parse_grammar(text: str) -> Grammar:
    """Read a `.twl2` text.

    Raises:
        GrammarError: naming the line where the text stops making sense.
    """
    actions: dict[str, ActionText] = {}
    rules: dict[str, tuple[Alternative, ...]] = {}
    inside: dict[str, str] | None = None
    place = 0
    while True:
        match = _ITEM.match(text, place)
        kind = match.lastgroup if match else None
        outside = kind in ("action", "end")
        if match is None or (outside != (inside is None) and kind not in ("grammar", None)):
            line = text.count("\n", 0, place) + 1
            raise GrammarError(f"the text grammar makes no sense from line {line} on: {text[place:place + 60]!r}")
        place = match.end()
        if kind == "end":
            return Grammar(actions, rules)
        if kind == "action":
            inside = {"name": match["action"].lower()}
        elif kind == "grammar":
            rules.update(_read_rules(match["grammar"], inside is not None))
        elif kind == "close" and inside is not None:
            if not {"template", "feedback"} <= inside.keys():
                raise GrammarError(f"action {inside['name']} of the text grammar needs a template and a feedback")
            actions[inside["name"]] = ActionText(inside["template"], inside["feedback"])
            inside = None
        elif kind is not None and inside is not None:
            inside[kind] = match[kind]


@lru_cache(maxsize=256)
def _read_rules(block: str, in_action: bool) -> dict[str, tuple[Alternative, ...]]:
    block = textwrap.dedent(block)
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
    """A piece of a text: kind is literal, rule, repeat or list; `query` selects what the last two run over."""

    kind: str
    content: str
    is_rule: bool = False
    query: str = ""


_STATEMENT = r"[^|\[\]{}\n<>]+"
_TAG = r"\#[\w()/!<>\-\s,.]+\#"
_BRACES = rf"\{{\t*(?:(?P<tag>{_TAG})|(?P<code>{_STATEMENT}))\t*(?:\s*\|\s*(?P<query>[^;|{{}}\n\[\]\#]+))?\}}"
_PART = re.compile(
    rf"""\[\t*{_BRACES}\t*\]|{_BRACES.replace("?P<", "?P<bare_")}|(?P<rule>{_TAG})
        |"(?P<quoted>[^;|"<>\[\]\#{{}}]*)"|(?P<literal>[^;|"<>\[\]\#{{}}]+)""",
    re.VERBOSE,
)
_SKIPPED = re.compile(r"\t+|(?://.*|\s+)\n?")


@lru_cache(maxsize=4096)
def split_text(text: str) -> tuple[Part, ...]:
    """Cut a text into its pieces; whatever follows the first character that fits nowhere is lost."""
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
    """Pass over tabs, and at the start of a line over blanks and `//` comments."""
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
        return Part("rule", found["rule"][1:-1])
    if found["literal"] is not None or found["quoted"] is not None:
        return Part("literal", found["literal"] if found["literal"] is not None else found["quoted"])
    kind, prefix = ("list", "") if match[0].startswith("[") else ("repeat", "bare_")
    tag, code, query = (found[prefix + name] for name in ("tag", "code", "query"))
    return Part(kind, tag[1:-1] if tag else code, tag is not None, (query or "").strip())


_QUERY_ATOM = re.compile(r"\s*([\w/!]+)\s*\(([^()]*)\)\s*")


@lru_cache(maxsize=1024)
def parse_query(text: str) -> tuple[tuple[str, Bound], ...]:
    """Read `p(x:type) & q(..)` as ((p, ((x, type),)), …)."""
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


_ATTRIBUTES = ("id", "name", "type", "definite", "indefinite")


class Words(NamedTuple):
    """What a text may say of an object, by its number; `parts[attribute][object]`."""

    id: tuple[str, ...]
    name: tuple[str, ...]
    type: tuple[str, ...]
    definite: tuple[str, ...]
    indefinite: tuple[str, ...]


Writer = Callable[..., str | None]  # (S, W, L, *objects): tables, Words, the game's linked rules
Links = dict[tuple[str, Bound], Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """An alternative as code.

    `links` are the rules it refers to, with what is bound there; `uses` are the places of the bound objects that it
    or one of those rules may look at.
    """

    write: Writer
    links: tuple[tuple[str, Bound], ...]
    reads: frozenset[str]
    uses: frozenset[int]


class _TextCode:
    """Compiles one alternative for one set of bound placeholders."""

    def __init__(self, schema: Schema, bound: Bound, untrusted: frozenset[str]) -> None:
        self.code = Code(schema, {}, untrusted)
        self.bound = bound
        self.arguments = [f"b{place}" for place in range(len(bound))]
        self.code.names = {_variable(p): name for p, name in zip(bound, self.arguments, strict=True)}
        self.links: dict[tuple[str, Bound], str] = {}
        self.scope: dict[str, Any] = {}

    def compile(self, alternative: Alternative) -> Compiled:
        code = self.code
        if alternative.condition:
            before = dict(code.names)
            code.write("def condition():")
            code.depth += 1
            self._match(alternative.condition, self.bound)
            code.write("return True")
            code.depth, code.names = 2, before
            code.write("return False")
            code.depth = 1
            code.write("if not condition(): return None")
        code.write("out = []")
        for part in split_text(alternative.text):
            self._write(part)
            code.depth = 1
        code.write("return ''.join(out)")
        function = code.build(["S", "W", "L", *self.arguments], self.scope)
        words = set(re.findall(r"\w+", "\n".join(code.lines)))
        uses = frozenset(place for place, name in enumerate(self.arguments) if name in words)
        return Compiled(function, tuple(self.links), frozenset(code.reads), uses)

    def _write(self, part: Part) -> None:
        code = self.code
        if part.kind == "literal":
            code.write(f"out.append({self._constant(part.content)})")
        elif part.kind == "rule":
            code.write(f"out.append({self._call(part.content, self.bound)})")
        else:
            before = dict(code.names)
            is_list = part.kind == "list"
            if is_list:
                code.write("items = []")
            bound = self._match(part.query, self.bound) if part.query else self.bound
            value = self._call(part.content, bound) if part.is_rule else self._expression(part.content, bound)
            code.write(f"{'items' if is_list else 'out'}.append({value})")
            code.names, code.depth = before, 1
            if is_list:
                self._join_items()

    def _join_items(self) -> None:
        separators = {
            name: self._call(name, self.bound) for name in ("list_empty", "list_separator", "list_last_separator")
        }
        self.code.write("if len(items) > 1:")
        self.code.write(
            f" out.append({separators['list_separator']}.join(items[:-1])"
            f" + {separators['list_last_separator']} + items[-1])"
        )
        self.code.write(f"else: out.append(items[0] if items else {separators['list_empty']})")

    def _match(self, query: str, bound: Bound) -> Bound:
        """Open loops over the matches of a query; return what is bound inside them."""
        for name, placeholders in parse_query(query):
            try:
                declared = self.code.schema.types_of(name)
            except PddlError as error:
                raise GrammarError(f"{error}, in the query {query!r}") from error
            if len(declared) != len(placeholders):
                raise GrammarError(f"'{name}' takes {len(declared)} arguments, in the query {query!r}")
            kinds = {_variable(placeholder): placeholder[1] for placeholder in placeholders}
            self.code.bind(Atom(name, tuple(kinds) if len(kinds) == len(placeholders) else tuple(
                _variable(placeholder) for placeholder in placeholders)), kinds, distinct=True)
            bound += tuple(p for p in dict.fromkeys(placeholders) if p not in bound)
        return bound

    def _constant(self, value: str) -> str:
        name = f"K{len(self.scope)}"
        self.scope[name] = value
        return name

    def _call(self, rule: str, bound: Bound) -> str:
        key = self._constant_of((rule, bound))
        values = "".join(f", {self.code.names[_variable(placeholder)]}" for placeholder in bound)
        return f"L[{key}](S, W, L{values})"

    def _constant_of(self, link: tuple[str, Bound]) -> str:
        if link not in self.links:
            self.links[link] = f"K{len(self.scope)}"
            self.scope[self.links[link]] = link
        return self.links[link]

    def _expression(self, source: str, bound: Bound) -> str:
        try:
            tree = ast.parse(source.strip(), mode="eval").body
        except SyntaxError as error:
            raise GrammarError(f"{source!r} is not an expression") from error
        return f"({self._translate(tree, source, {name: _variable((name, kind)) for name, kind in bound})})"

    def _translate(self, node: ast.expr, source: str, variables: dict[str, str]) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._constant(node.value)
        if isinstance(node, ast.Name) and node.id in variables:
            return f"W.name[{self.code.names[variables[node.id]]}]"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in _ATTRIBUTES:
            if node.value.id in variables:
                return f"W.{node.attr}[{self.code.names[variables[node.value.id]]}]"
            raise GrammarError(f"nothing is called '{node.value.id}' in the expression {source!r}")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = (self._translate(side, source, variables) for side in (node.left, node.right))
            return f"({left} + {right})"
        if isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.Or) else " and "
            return f"({word.join(self._translate(value, source, variables) for value in node.values)})"
        raise GrammarError(f"the expression {source!r} uses more than names, attributes, strings, '+', 'or', 'and'")


def _variable(placeholder: Placeholder) -> str:
    return f"?{placeholder[0]}:{placeholder[1]}"


def compile_alternative(
    schema: Schema, alternative: Alternative, bound: Bound, untrusted: frozenset[str]
) -> Compiled:
    """Compile one alternative of a rule; plain text needs no code of its own."""
    parts = split_text(alternative.text)
    if not alternative.condition and all(part.kind == "literal" for part in parts):
        text = "".join(part.content for part in parts)
        return Compiled(lambda *_: text, (), frozenset(), frozenset())
    return _compile(schema, alternative, bound, untrusted)


@lru_cache(maxsize=4096)
def _compile(schema: Schema, alternative: Alternative, bound: Bound, untrusted: frozenset[str]) -> Compiled:
    return _TextCode(schema, bound, untrusted).compile(alternative)


def rule_writer(name: str, alternatives: Sequence[Compiled]) -> Callable[..., str]:
    """Make the function that writes a rule by its first alternative whose condition holds."""
    writers = [alternative.write for alternative in alternatives]

    def write(tables: Tables, words: Words, links: Links, *objects: int) -> str:
        for writer in writers:
            text = writer(tables, words, links, *objects)
            if text is not None:
                return text
        raise GrammarError(f"the rule '{name}' does not exist, or none of its alternatives applies")

    return write


def link(
    schema: Schema, grammar: Grammar, roots: Iterable[tuple[str, Bound]], untrusted: frozenset[str]
) -> tuple[Links, frozenset[str]]:
    """Compile every rule that `roots` reach; return the writers and the predicates they read."""
    links: Links = {}
    reads: set[str] = set()
    waiting = list(roots)
    while waiting:
        key = waiting.pop()
        if key in links:
            continue
        name, bound = key
        compiled = [compile_alternative(schema, item, bound, untrusted) for item in grammar.rules.get(name, ())]
        links[key] = rule_writer(name, compiled)
        for item in compiled:
            waiting += item.links
            reads |= item.reads
    return links, frozenset(reads)
