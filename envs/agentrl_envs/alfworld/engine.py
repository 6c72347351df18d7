"""Play one game: `advance(state, command)` is a pure function, so an episode can branch at every state."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

from agentrl_envs.alfworld.grammar import parse_grammar
from agentrl_envs.alfworld.pddl import Domain, GameFileError, Problem, parse_goal, parse_problem
from agentrl_envs.alfworld.query_compiler import NEGATED, TYPE, Fact, Index, Tables
from agentrl_envs.alfworld.rules import rules_of
from agentrl_envs.alfworld.text import Words, action_texts, opening_writer

Operator = tuple[int, Fact]  # index of the action, and its arguments
Menu = list[tuple[str, Operator]]  # the commands of one action
NOTHING = "Nothing happens."


class GameState(NamedTuple):
    """State of a game; immutable, and usable after pickling with an equal `Game` in another process.

    `admissible` is sorted. `won` says whether the goal holds in this state; a later command can undo it.
    `key` is equal for equal states of one game, however they were reached.
    """

    observation: str
    admissible: tuple[str, ...]
    won: bool
    moves: int
    key: int
    tables: Tables
    commands: dict[str, Operator]
    menus: tuple[Menu, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """Effect of an operator: changed table rows, and which menus and whether the goal must be recomputed."""

    updates: tuple[tuple[Index, Fact, bool], ...]
    flips: tuple[tuple[Index, Fact, bool, int], ...]
    stale: tuple[int, ...]
    goal_stale: bool


class Game:
    """One game file, compiled and ready to play; immutable, so threads may share it.

    Args:
        domain: The PDDL domain.
        problem: The PDDL problem.
        grammar: The `.twl2` text grammar, including the goal sentence.
        walkthrough: The commands that solve the game, if known.
        other_goal: A second goal for `other_reached`, written as the end of a PDDL problem.

    Raises:
        GameFileError: A text is malformed or uses an unsupported feature (PddlError or GrammarError).
    """

    def __init__(
        self, domain: str, problem: str, grammar: str, walkthrough: Sequence[str] = (), other_goal: str = ""
    ) -> None:
        self.walkthrough = tuple(walkthrough)
        rules = rules_of(domain)
        parsed = parse_problem(problem, rules.domain)
        self.objects = parsed.objects
        untrusted = rules.untrusted(_mistyped(parsed, rules.domain))
        self._actions = rules.actions(untrusted)
        self._goal, self._goal_constants = rules.goal(parsed.goal, parsed.number, untrusted)
        self._other = None
        if other_goal:
            formula = parse_goal(other_goal, parsed.number, rules.domain)
            self._other = rules.goal(formula, parsed.number, untrusted)
        self._constants = tuple(parsed.number.get(name, -1) for name in rules.constants)
        self._words = _words(parsed)
        texts = parse_grammar(grammar)
        self._texts = action_texts(rules, self._actions, texts, untrusted)
        opening = opening_writer(rules, texts, untrusted)
        self._indexes = rules.schema.snapshot()
        self._operators: dict[Operator, _Step] = {}
        self._commands: tuple[dict[Any, str], ...] = tuple({} for _ in self._actions)
        self._readers: dict[frozenset[str], tuple[int, ...]] = {}
        tables = self._build_tables(parsed, rules.domain.ancestors, rules.schema.size)
        self.start = self._first(opening(tables, self._words), tables)

    def _build_tables(self, problem: Problem, ancestors: Mapping[str, frozenset[str]], size: int) -> Tables:
        rows = dict(problem.facts)
        for number, kind in enumerate(problem.types):
            for ancestor in ancestors[kind]:
                rows.setdefault(TYPE + ancestor, []).append((number,))
        tables: list[Any] = [None] * size
        for predicate, indexes in self._indexes.items():
            for index in indexes:
                tables[index.slot] = index.build(rows.get(predicate, ()))
        return tuple(tables)

    def _first(self, text: str, tables: Tables) -> GameState:
        menus = tuple(self._menu(place, tables) for place in range(len(self._actions)))
        commands = self._operators_of(menus)
        won = self._goal.holds(tables, self._goal_constants)
        return GameState(text, tuple(sorted(commands)), won, 0, 0, tables, commands, menus)

    def advance(self, state: GameState, command: str) -> GameState:
        """Return the state after `command`; an inadmissible command changes only the observation."""
        operator = state.commands.get(command) or state.commands.get(command.strip())
        if operator is None:
            return GameState(NOTHING, *state[1:])
        step = self._operators.get(operator) or self._step(operator, state.tables)
        key = state.key
        for index, fact, present, code in step.flips:
            if index.contains(state.tables[index.slot], fact) != present:
                key ^= code
        changed = list(state.tables)
        for index, fact, present in step.updates:
            changed[index.slot] = index.update(changed[index.slot], fact, present)
        tables = tuple(changed)
        place, arguments = operator
        text = self._texts.feedback[place](tables, self._words, self._texts.links, *arguments)
        won = self._goal.holds(tables, self._goal_constants) if step.goal_stale else state.won
        moves = state.moves + 1
        if not step.stale:
            return GameState(text, state.admissible, won, moves, key, tables, state.commands, state.menus)
        renewed = list(state.menus)
        for stale in step.stale:
            renewed[stale] = self._menu(stale, tables)
        menus = tuple(renewed)
        commands = self._operators_of(menus)
        return GameState(text, tuple(sorted(commands)), won, moves, key, tables, commands, menus)

    def _menu(self, place: int, tables: Tables) -> Menu:
        uses, texts = self._texts.uses[place], self._commands[place]
        applicable = self._actions[place].applicable(tables, self._constants)
        return [
            (texts.get(uses(arguments)) or self._command(place, arguments, tables), (place, arguments))
            for arguments in applicable
        ]

    def _command(self, place: int, arguments: Fact, tables: Tables) -> str:
        """Write and cache the command of an operator, which depends only on facts that never change."""
        text: str = self._texts.command[place](tables, self._words, self._texts.links, *arguments)
        self._commands[place][self._texts.uses[place](arguments)] = text
        return text

    def _operators_of(self, menus: tuple[Menu, ...]) -> dict[str, Operator]:
        commands = dict(chain.from_iterable(menus))
        if len(commands) != sum(map(len, menus)):
            for menu in menus:
                for command, operator in menu:
                    commands[command] = min(commands[command], operator, key=self._operator_name)
        return commands

    def _operator_name(self, operator: Operator) -> tuple[str, ...]:
        return (self._actions[operator[0]].name, *(self.objects[number] for number in operator[1]))

    def _step(self, operator: Operator, tables: Tables) -> _Step:
        """Compute the effect of an operator; cache it unless it depends on the state."""
        place, arguments = operator
        action = self._actions[place]
        changes = action.changes(tables, arguments, self._constants)
        updates, flips = [], []
        for predicate, fact, present in changes:
            if predicate in self._indexes:
                flips.append((self._indexes[predicate][0], fact, present, self._fact_code(predicate, fact)))
            for name, value in ((predicate, present), (NEGATED + predicate, not present)):
                updates += [(index, fact, value) for index in self._indexes.get(name, ())]
        touched = frozenset(predicate for predicate, _, _ in changes)
        step = _Step(
            tuple(updates), tuple(flips), self._stale(touched), not touched.isdisjoint(self._goal.reads)
        )
        if not action.depends_on_state:
            self._operators[operator] = step
        return step

    def _fact_code(self, predicate: str, fact: Fact) -> int:
        name = " ".join((predicate, *(self.objects[number] for number in fact)))
        return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")

    def _stale(self, touched: frozenset[str]) -> tuple[int, ...]:
        """Return the actions whose menus depend on a predicate in `touched`."""
        if touched not in self._readers:
            self._readers[touched] = tuple(
                place for place, action in enumerate(self._actions) if not touched.isdisjoint(action.reads)
            )
        return self._readers[touched]

    def other_reached(self, state: GameState) -> bool:
        """Return whether the second goal holds in a state; False if the game has none."""
        return self._other is not None and self._other[0].holds(state.tables, self._other[1])

    def facts(self, state: GameState, predicate: str) -> list[tuple[str, ...]]:
        """Return the true facts of a predicate that some rule looks up, ordered by object names."""
        for index in self._indexes.get(predicate, ()):
            rows = index.rows(state.tables[index.slot])
            return [tuple(self.objects[number] for number in row) for row in sorted(rows)]
        raise GameFileError(f"this game never looks up the predicate '{predicate}'")


def _mistyped(problem: Problem, domain: Domain) -> frozenset[str]:
    """Return the predicates with an initial fact about an object of another type than declared."""
    return frozenset(
        predicate
        for predicate, rows in problem.facts.items()
        for place, kind in enumerate(domain.predicates[predicate])
        if any(not domain.is_a(problem.types[row[place]], kind) for row in rows)
    )


def _words(problem: Problem) -> Words:
    """Build the wording of every object; only objects that occur in a fact are numbered within a class."""
    used = sorted({number for rows in problem.facts.values() for row in rows for number in row})
    spoken = list(problem.objects)
    for number, name in zip(used, display_names([problem.objects[n] for n in used]), strict=True):
        spoken[number] = name
    count = len(spoken)
    return Words(problem.objects, tuple(spoken), problem.types, ("the",) * count, ("a",) * count)


def display_names(ids: Sequence[str]) -> list[str]:
    """Return the names that the player sees, such as "mug 2"; within a class, later ids get lower numbers."""
    lowered = [name.lower() for name in ids]
    left = Counter(kind for name in lowered if (kind := _class(name)))
    names = dict.fromkeys(lowered, "")
    for name in sorted(lowered):
        kind = _class(name)
        names[name] = f"{kind} {left[kind]}" if kind else f"{_spoken(name)} "
        left[kind or ""] -= 1
    return [names[name] for name in lowered]


def _class(name: str) -> str | None:
    head, bar, _ = name.partition("_bar_")
    if not bar:
        return None
    return head + "basin" if "basin" in name else head


def _spoken(name: str) -> str:
    for code, sign in (("_bar_", "|"), ("_minus_", "-"), ("_plus_", "+"), ("_dot_", "."), ("_comma_", ",")):
        name = name.replace(code, sign)
    return name
