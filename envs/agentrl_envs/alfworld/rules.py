"""Compile a domain's actions and a game's goal."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentrl_envs.alfworld.pddl import (
    TRUE,
    Action,
    Atom,
    Domain,
    Effect,
    Formula,
    Junction,
    Quantified,
    constants_of,
    parse_domain,
)
from agentrl_envs.alfworld.query_compiler import NEGATED, TYPE, Code, Fact, Schema, Tables

Change = tuple[str, Fact, bool]


@dataclass(frozen=True, slots=True)
class CompiledEffect:
    """A literal that an operator makes true where `condition` holds, once per row of `expand` if given."""

    predicate: str
    arguments: tuple[tuple[bool, int], ...]
    positive: bool
    condition: Callable[..., bool] | None
    expand: Callable[..., list[Fact]] | None


@dataclass(frozen=True, slots=True)
class CompiledAction:
    """An action whose `applicable(S, C)` lists the argument tuples for which its precondition holds."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    applicable: Callable[[Tables, Fact], Sequence[Fact]]
    reads: frozenset[str]
    effects: tuple[CompiledEffect, ...]

    @property
    def depends_on_state(self) -> bool:
        """Return whether the effect of the action depends on the state."""
        return any(effect.condition is not None for effect in self.effects)

    def changes(self, tables: Tables, arguments: Fact, constants: Fact) -> list[Change]:
        """Return the facts that become false and true; a fact that is both added and deleted is added."""
        false: dict[Change, None] = {}
        true: dict[Change, None] = {}
        for effect in self.effects:
            rows: Sequence[Fact] = ((),) if effect.expand is None else effect.expand(tables, constants)
            for row in rows:
                values = arguments + row
                if effect.condition is None or effect.condition(tables, constants, *values):
                    fact = _ground(effect.arguments, values, constants)
                    (true if effect.positive else false)[effect.predicate, fact, effect.positive] = None
        return [*(c for c in false if (c[0], c[1], True) not in true), *true]


def _ground(places: tuple[tuple[bool, int], ...], values: Fact, constants: Fact) -> Fact:
    return tuple(values[i] if is_value else constants[i] for is_value, i in places)


class Rules:
    """A domain, compiled once and shared by all games that embed the same text."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.schema = Schema(domain)
        literals = [effect.literal for action in domain.actions for effect in action.effects]
        self.fluents = frozenset(literal.predicate for literal in literals)
        self.conditional = frozenset(
            effect.literal.predicate
            for action in domain.actions
            for effect in action.effects
            if effect.condition != TRUE
        )
        named = {name: None for action in domain.actions for name in _action_constants(action)}
        self.constants = {name: place for place, name in enumerate(named)}
        self._mistyped = frozenset(self._mistyped_effects())
        self._lock = threading.Lock()
        self._actions: dict[frozenset[str], tuple[CompiledAction, ...]] = {}
        self._goals: dict[Formula, Goal] = {}

    def _mistyped_effects(self) -> Iterator[str]:
        """Yield the predicates that some action fills with objects of another type than declared."""
        for action in self.domain.actions:
            for effect in action.effects:
                kinds = {**dict(action.parameters + effect.variables), **self.domain.constants}
                declared = self.domain.predicates[effect.literal.predicate]
                for argument, kind in zip(effect.literal.arguments, declared, strict=True):
                    if not self.domain.is_a(kinds.get(argument, kind), kind):
                        yield effect.literal.predicate

    def untrusted(self, facts: frozenset[str]) -> frozenset[str]:
        """Return the predicates whose declared types are broken, by the given facts or by some action."""
        broken = facts | self._mistyped
        return broken | {NEGATED + predicate for predicate in broken}

    def actions(self, untrusted: frozenset[str]) -> tuple[CompiledAction, ...]:
        """Compile the actions, with type tests for the variables that `untrusted` predicates bind."""
        with self._lock:
            if untrusted not in self._actions:
                compiled = (_compile_action(self, action, untrusted) for action in self.domain.actions)
                self._actions[untrusted] = tuple(compiled)
            return self._actions[untrusted]

    def goal(
        self, formula: Formula, number: Mapping[str, int], untrusted: frozenset[str]
    ) -> tuple["Goal", Fact]:
        """Compile a goal; goals that differ only in the objects they name share their code.

        Returns:
            The code, and the numbers of the objects to pass to it.
        """
        named = tuple(constants_of(formula))
        pattern = _with_constants(formula, {name: f"constant{place}" for place, name in enumerate(named)})
        key = Junction("and", (pattern, Atom("=", tuple(sorted(untrusted)))))
        with self._lock:
            if key not in self._goals:
                self._goals[key] = _compile_goal(self, pattern, len(named), untrusted)
            return self._goals[key], tuple(number[name] for name in named)


@dataclass(frozen=True, slots=True)
class Goal:
    """A compiled goal: `holds(S, C)` returns whether it is reached, and depends on the predicates `reads`."""

    holds: Callable[[Tables, Fact], bool]
    reads: frozenset[str]


@lru_cache(maxsize=64)
def rules_of(domain_text: str) -> Rules:
    """Parse and compile a domain file, once per text and process."""
    return Rules(parse_domain(domain_text))


def _action_constants(action: Action) -> Iterator[str]:
    yield from constants_of(action.precondition)
    for effect in action.effects:
        yield from constants_of(effect.condition)
        yield from constants_of(effect.literal)


def _with_constants(formula: Formula, names: dict[str, str]) -> Formula:
    if isinstance(formula, Atom):
        arguments = tuple(names.get(argument, argument) for argument in formula.arguments)
        return Atom(formula.predicate, arguments, formula.positive)
    if isinstance(formula, Junction):
        return Junction(formula.kind, tuple(_with_constants(part, names) for part in formula.parts))
    return Quantified(formula.kind, formula.variables, _with_constants(formula.body, names))


def _alternatives(formula: Formula) -> tuple[Formula, ...]:
    """Split a top-level disjunction, so that each part can enumerate its own objects."""
    return formula.parts if isinstance(formula, Junction) and formula.kind == "or" else (formula,)


def _compile_action(rules: Rules, action: Action, untrusted: frozenset[str]) -> CompiledAction:
    code = Code(rules.schema, rules.constants, untrusted)
    parts = _alternatives(action.precondition)
    once = len(parts) == 1 and not any(isinstance(p, Quantified) for p in _parts(action.precondition))
    code.write("found = []" if once else "found = {}")
    for part in parts:
        code.names, code.depth = {}, 1
        code.join(part, dict(action.parameters), rules.fluents)
        void = _void(code, action)
        if void is not None:
            code.open(f"if not ({void}):")
        values = "".join(f"{code.names[name]}, " for name, _ in action.parameters)
        code.write(f"found.append(({values}))" if once else f"found[({values})] = None")
    code.depth = 1
    code.write("return found" if once else "return list(found)")
    effects = tuple(_compile_effect(rules, action, effect, untrusted) for effect in action.effects)
    reads = frozenset(code.reads)
    return CompiledAction(action.name, action.parameters, code.build(["S", "C"]), reads, effects)


def _void(code: Code, action: Action) -> str | None:
    """Return the condition under which an operator changes nothing, such as going to the current place.

    TextWorld has no such operators. Deleting a fact that is also added changes nothing, too. None means that
    the operator always changes something.
    """
    required = [part for part in _parts(action.precondition) if isinstance(part, Atom)]
    added = [effect.literal for effect in action.effects if effect.literal.positive]
    tests = []
    for effect in action.effects:
        literal = effect.literal
        if effect.variables or effect.condition != TRUE:
            return None
        same = [part for part in required if part.positive == literal.positive]
        if not literal.positive:
            same += added
        ways = [_equal(code, literal, other) for other in same if other.predicate == literal.predicate]
        if not ways:
            return None
        tests.append(f"({' or '.join(ways)})")
    return " and ".join(tests)


def _equal(code: Code, left: Atom, right: Atom) -> str:
    pairs = [pair for pair in zip(left.arguments, right.arguments, strict=True) if pair[0] != pair[1]]
    return " and ".join(f"{code.value(a)} == {code.value(b)}" for a, b in pairs) or "True"


def _parts(formula: Formula) -> tuple[Formula, ...]:
    return formula.parts if isinstance(formula, Junction) and formula.kind == "and" else (formula,)


def _places(atom: Atom, places: dict[str, tuple[bool, int]], rules: Rules) -> tuple[tuple[bool, int], ...]:
    return tuple(places.get(name) or (False, rules.constants[name]) for name in atom.arguments)


def _compile_effect(
    rules: Rules, action: Action, effect: Effect, untrusted: frozenset[str]
) -> CompiledEffect:
    variables = [name for name, _ in action.parameters + effect.variables]
    places = {name: (True, place) for place, name in enumerate(variables)}
    condition = expand = None
    if effect.condition != TRUE:
        code = Code(rules.schema, rules.constants, untrusted)
        code.names = {name: f"p{place}" for place, name in enumerate(variables)}
        code.write(f"return {code.expression(effect.condition)}")
        condition = code.build(["S", "C", *(f"p{place}" for place in range(len(variables)))])
    if effect.variables:
        code = Code(rules.schema, rules.constants, untrusted)
        code.write("found = []")
        for name, kind in effect.variables:
            code.scan(name, kind)
        code.write(f"found.append(({''.join(f'{code.names[name]}, ' for name, _ in effect.variables)}))")
        code.depth = 1
        code.write("return found")
        expand = code.build(["S", "C"])
    literal = effect.literal
    return CompiledEffect(
        literal.predicate, _places(literal, places, rules), literal.positive, condition, expand
    )


def _compile_goal(rules: Rules, pattern: Formula, constants: int, untrusted: frozenset[str]) -> Goal:
    code = Code(rules.schema, {f"constant{place}": place for place in range(constants)}, untrusted)
    for part in _alternatives(pattern):
        code.names, code.depth = {}, 1
        code.join(part, {}, rules.fluents)
        code.write("return True")
    code.depth = 1
    code.write("return False")
    function: Any = code.build(["S", "C"])
    return Goal(function, frozenset(name for name in code.reads if not name.startswith(TYPE)))
