"""Compile the texts of a game into functions that write its commands and its observations."""

import ast
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from agentrl_envs.alfworld.grammar import (
    Alternative,
    Bound,
    Grammar,
    GrammarError,
    Part,
    Placeholder,
    parse_query,
    split_text,
)
from agentrl_envs.alfworld.pddl import Atom, PddlError
from agentrl_envs.alfworld.query_compiler import NEGATED, Code, Fact, Schema, Tables
from agentrl_envs.alfworld.rules import CompiledAction, Rules

_ATTRIBUTES = ("id", "name", "type", "definite", "indefinite")


class Words(NamedTuple):
    """Attributes of the objects that a text may use, indexed as `words.attribute[object]`."""

    id: tuple[str, ...]
    name: tuple[str, ...]
    type: tuple[str, ...]
    definite: tuple[str, ...]
    indefinite: tuple[str, ...]


Writer = Callable[..., str | None]  # (S, W, L, *objects): tables, Words, the game's linked rules
Links = dict[tuple[str, Bound], Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled alternative of a rule.

    `links` are the rules that it refers to, with their bound placeholders; `uses` are the positions of the
    bound objects that it or one of those rules may read.
    """

    write: Writer
    links: tuple[tuple[str, Bound], ...]
    reads: frozenset[str]
    uses: frozenset[int]


class _TextCode:
    """Compiler of one alternative for one set of bound placeholders."""

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
            name: self._call(name, self.bound)
            for name in ("list_empty", "list_separator", "list_last_separator")
        }
        self.code.write("if len(items) > 1:")
        self.code.write(
            f" out.append({separators['list_separator']}.join(items[:-1])"
            f" + {separators['list_last_separator']} + items[-1])"
        )
        self.code.write(f"else: out.append(items[0] if items else {separators['list_empty']})")

    def _match(self, query: str, bound: Bound) -> Bound:
        """Open loops over the matches of a query; return the placeholders bound inside them."""
        for name, placeholders in parse_query(query):
            try:
                declared = self.code.schema.types_of(name)
            except PddlError as error:
                raise GrammarError(f"{error}, in the query {query!r}") from error
            if len(declared) != len(placeholders):
                raise GrammarError(f"'{name}' takes {len(declared)} arguments, in the query {query!r}")
            kinds = {_variable(placeholder): placeholder[1] for placeholder in placeholders}
            atom = Atom(name, tuple(_variable(placeholder) for placeholder in placeholders))
            self.code.bind(atom, kinds, distinct=True)
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
        raise GrammarError(
            f"the expression {source!r} uses more than names, attributes, strings, '+', 'or', 'and'"
        )


def _variable(placeholder: Placeholder) -> str:
    return f"?{placeholder[0]}:{placeholder[1]}"


def compile_alternative(
    schema: Schema, alternative: Alternative, bound: Bound, untrusted: frozenset[str]
) -> Compiled:
    """Compile one alternative of a rule; plain text becomes a constant function."""
    parts = split_text(alternative.text)
    if not alternative.condition and all(part.kind == "literal" for part in parts):
        text = "".join(part.content for part in parts)
        return Compiled(lambda *_: text, (), frozenset(), frozenset())
    return _compile(schema, alternative, bound, untrusted)


@lru_cache(maxsize=4096)
def _compile(schema: Schema, alternative: Alternative, bound: Bound, untrusted: frozenset[str]) -> Compiled:
    return _TextCode(schema, bound, untrusted).compile(alternative)


def _rule_writer(name: str, alternatives: Sequence[Compiled]) -> Callable[..., str]:
    """Return the function that writes a rule with its first alternative whose condition holds."""
    writers = [alternative.write for alternative in alternatives]

    def write(tables: Tables, words: Words, links: Links, *objects: int) -> str:
        for writer in writers:
            text = writer(tables, words, links, *objects)
            if text is not None:
                return text
        raise GrammarError(f"the rule '{name}' does not exist, or none of its alternatives applies")

    return write


Rulebook = dict[str, tuple[Alternative, ...]]


def _link(
    schema: Schema, rulebook: Rulebook, roots: Iterable[tuple[str, Bound]], untrusted: frozenset[str]
) -> tuple[Links, frozenset[str]]:
    """Compile every rule reachable from `roots`; return the writers and the predicates that they read."""
    links: Links = {}
    reads: set[str] = set()
    waiting = list(roots)
    while waiting:
        key = waiting.pop()
        if key in links:
            continue
        name, bound = key
        compiled = [compile_alternative(schema, item, bound, untrusted) for item in rulebook.get(name, ())]
        links[key] = _rule_writer(name, compiled)
        for item in compiled:
            waiting += item.links
            reads |= item.reads
    return links, frozenset(reads)


class ActionTexts(NamedTuple):
    """Writers of the texts of a game's actions; shared by games, which differ only in their opening text.

    Per action: `command` and `feedback` write its texts from (tables, Words, links, *arguments); `uses`
    selects the arguments that the command depends on.
    """

    links: Links
    command: tuple[Callable[..., str], ...]
    uses: tuple[Callable[[Fact], Any], ...]
    feedback: tuple[Callable[..., str], ...]


@dataclass(frozen=True, slots=True)
class _CachedTexts:
    """Compiled texts and everything that they were compiled from."""

    rules: Rules
    untrusted: frozenset[str]
    rulebook: Rulebook
    texts: ActionTexts

    def fits(self, rules: Rules, untrusted: frozenset[str], rulebook: Rulebook) -> bool:
        return (
            self.rules is rules
            and self.untrusted == untrusted
            and all(rulebook.get(name, ()) == alternatives for name, alternatives in self.rulebook.items())
        )


_cache: deque[_CachedTexts] = deque(maxlen=16)
_cache_lock = threading.Lock()


def action_texts(
    rules: Rules, actions: Sequence[CompiledAction], grammar: Grammar, untrusted: frozenset[str]
) -> ActionTexts:
    """Compile the texts of the actions, or reuse those of an earlier game with the same grammar.

    Raises:
        GrammarError: A text cannot be parsed, or depends on facts that this engine does not track.
    """
    rulebook = dict(grammar.rules)
    for action in actions:
        if action.name not in grammar.actions:
            raise GrammarError(f"the text grammar has no action '{action.name}'")
        text = grammar.actions[action.name]
        rulebook[f"command of {action.name}"] = (Alternative("", text.command),)
        rulebook[f"feedback of {action.name}"] = (Alternative("", text.feedback),)
    with _cache_lock:
        for cached in _cache:
            if cached.fits(rules, untrusted, rulebook):
                return cached.texts
    texts = _compile_action_texts(rules, actions, rulebook, untrusted)
    used = {name: rulebook.get(name, ()) for name, _ in texts.links}
    with _cache_lock:
        _cache.appendleft(_CachedTexts(rules, untrusted, used, texts))
    return texts


def _compile_action_texts(
    rules: Rules, actions: Sequence[CompiledAction], rulebook: Rulebook, untrusted: frozenset[str]
) -> ActionTexts:
    bounds = [tuple((name.strip("?"), kind) for name, kind in action.parameters) for action in actions]
    names = [action.name for action in actions]
    commands = [(f"command of {name}", bound) for name, bound in zip(names, bounds, strict=True)]
    feedbacks = [(f"feedback of {name}", bound) for name, bound in zip(names, bounds, strict=True)]
    links, reads = _link(rules.schema, rulebook, commands, untrusted)
    _refuse(reads, rules.fluents, "the command of an action depends on '{}', which changes")
    more, reads = _link(rules.schema, rulebook, feedbacks, untrusted)
    _refuse(reads, rules.conditional, "a text depends on '{}', which changes under conditions")
    uses = []
    for name, bound in commands:
        places = compile_alternative(rules.schema, rulebook[name][0], bound, untrusted).uses
        uses.append(itemgetter(*sorted(places)) if places else _nothing)
    return ActionTexts(
        links | more,
        tuple(links[key] for key in commands),
        tuple(uses),
        tuple(more[key] for key in feedbacks),
    )


def _nothing(arguments: Fact) -> tuple[()]:
    return ()


def _refuse(reads: frozenset[str], changing: frozenset[str], reason: str) -> None:
    found = reads & (changing | {NEGATED + predicate for predicate in changing})
    if found:
        raise GrammarError(f"{reason.format(min(found))}: not supported")


def opening_writer(
    rules: Rules, grammar: Grammar, untrusted: frozenset[str]
) -> Callable[[Tables, Words], str]:
    """Compile the opening text of a game: its rule `intro`, with nothing bound."""
    links, reads = _link(rules.schema, grammar.rules, [("intro", ())], untrusted)
    _refuse(reads, rules.conditional, "the opening depends on '{}', which changes under conditions")
    write = links["intro", ()]
    return lambda tables, words: write(tables, words, links)
