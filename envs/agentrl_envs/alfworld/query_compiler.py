"""Compile conditions over facts into Python functions of nested loops (joins).

The facts of a state are stored in *tables*, one for each way in which some condition looks them up:

* a frozenset, to test a fact of one argument (or none);
* a dict from the bound arguments to the sorted tuple of the others, or only that tuple if nothing is bound.

An object is an int, numbered in the order of the names, so sorted tables give results in name order. The
generated code contains only names and numbers made here, never text of a game file.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl_envs.alfworld.pddl import Atom, Domain, Formula, Junction, PddlError, Quantified

Fact = tuple[int, ...]
Table = Any  # frozenset[int], tuple[int, ...], tuple[Fact, ...] or dict[int | Fact, tuple[int | Fact, ...]]
Tables = tuple[Table, ...]
TYPE = "type@"
NEGATED = "not_"


@dataclass(frozen=True, slots=True)
class Index:
    """One table: a predicate's facts, looked up by the arguments at `bound` (None: a set of entire facts)."""

    slot: int
    bound: tuple[int, ...] | None
    free: tuple[int, ...]

    def build(self, facts: Iterable[Fact]) -> Table:
        """Build the table of `facts`."""
        if self.bound is None:
            return frozenset(fact[0] if fact else () for fact in facts)
        if not self.bound:
            return tuple(sorted(self._rest(fact) for fact in facts))
        table: dict[Any, list[Any]] = {}
        for fact in facts:
            table.setdefault(self._key(fact), []).append(self._rest(fact))
        return {key: tuple(sorted(rests)) for key, rests in table.items()}

    def update(self, table: Table, fact: Fact, present: bool) -> Table:
        """Return the table after `fact` became true or false; the old table is not modified."""
        if self.bound is None:
            item = frozenset([fact[0] if fact else ()])
            return table | item if present else table - item
        rest = self._rest(fact)
        if not self.bound:
            return _changed(table, rest, present)
        key = self._key(fact)
        table = table.copy()
        table[key] = _changed(table.get(key, ()), rest, present)
        return table

    def contains(self, table: Table, fact: Fact) -> bool:
        """Return whether the table contains a fact."""
        if self.bound is None:
            return (fact[0] if fact else ()) in table
        return self._rest(fact) in (table.get(self._key(fact), ()) if self.bound else table)

    def rows(self, table: Table) -> Iterator[Fact]:
        """Yield the facts of a table."""
        if self.bound is None:
            yield from (item if item == () else (item,) for item in table)
            return
        groups = [((), table)] if not self.bound else table.items()
        for key, rests in groups:
            keys = (key,) if isinstance(key, int) else key
            for rest in rests:
                values = dict(zip(self.bound, keys, strict=True))
                values |= zip(self.free, (rest,) if isinstance(rest, int) else rest, strict=True)
                yield tuple(values[place] for place in range(len(values)))

    def _key(self, fact: Fact) -> Any:
        bound = self.bound or ()
        return fact[bound[0]] if len(bound) == 1 else tuple(fact[i] for i in bound)

    def _rest(self, fact: Fact) -> Any:
        return fact[self.free[0]] if len(self.free) == 1 else tuple(fact[i] for i in self.free)


def _changed(items: tuple[Any, ...], item: Any, present: bool) -> tuple[Any, ...]:
    if (item in items) == present:
        return items
    if present:
        return tuple(sorted((*items, item)))
    return tuple(other for other in items if other != item)


class Schema:
    """Layout of the tables for all code compiled for one domain; it grows as more code is compiled."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.indexes: dict[str, tuple[Index, ...]] = {}
        self.size = 0
        self._lock = threading.RLock()

    def slot(self, predicate: str, bound: tuple[int, ...] | None, arity: int) -> int:
        """Return the slot of the table for one way of looking up `predicate`, adding it if it is new."""
        with self._lock:
            for index in self.indexes.get(predicate, ()):
                if index.bound == bound:
                    return index.slot
            free = () if bound is None else tuple(i for i in range(arity) if i not in bound)
            index = Index(self.size, bound, free)
            self.indexes[predicate] = (*self.indexes.get(predicate, ()), index)
            self.size += 1
            return index.slot

    def types_of(self, predicate: str) -> tuple[str, ...]:
        """Return the argument types of a predicate, a negated one, or a type used as a predicate."""
        if predicate.startswith(TYPE):
            return (predicate.removeprefix(TYPE),)
        if predicate not in self.domain.predicates and predicate.startswith(NEGATED):
            predicate = predicate.removeprefix(NEGATED)
        if predicate not in self.domain.predicates:
            raise PddlError(f"predicate '{predicate}' is not declared")
        return self.domain.predicates[predicate]

    def snapshot(self) -> dict[str, tuple[Index, ...]]:
        """Return the tables known so far, for a game whose code is compiled."""
        with self._lock:
            return dict(self.indexes)


class Code:
    """Source code of a function under construction.

    In the code, `S` are the tables of a state and `C` the objects that the rules name.

    Args:
        schema: The layout of the tables.
        constants: The index in `C` of each object that the rules name.
        untrusted: The predicates whose facts may break their declared types, so types are tested.
    """

    def __init__(
        self, schema: Schema, constants: Mapping[str, int], untrusted: frozenset[str] = frozenset()
    ) -> None:
        self.schema = schema
        self.constants = constants
        self.untrusted = untrusted
        self.reads: set[str] = set()
        self.names: dict[str, str] = {}
        self.lines: list[str] = []
        self.depth = 1
        self._variables = 0

    def new_variable(self) -> str:
        """Return an unused variable name."""
        self._variables += 1
        return f"v{self._variables}"

    def write(self, line: str) -> None:
        """Append a line at the current indentation."""
        self.lines.append(" " * self.depth + line)

    def open(self, line: str) -> None:
        """Write the head of a block and indent the lines that follow."""
        self.write(line)
        self.depth += 1

    def build(self, arguments: Sequence[str], scope: Mapping[str, Any] | None = None) -> Callable[..., Any]:
        """Compile the written lines into a function."""
        source = "\n".join([f"def compiled({', '.join(arguments)}):", *self.lines])
        namespace: dict[str, Any] = dict(scope or {})
        try:
            exec(compile(source, "<agentrl alfworld rules>", "exec"), namespace)
        except SyntaxError as error:  # Python nests at most 20 loops
            raise PddlError(f"a condition has too many variables: {error}") from error
        function: Callable[..., Any] = namespace["compiled"]
        return function

    def value(self, argument: str) -> str:
        """Return the Python expression of a bound variable or of an object."""
        if argument.startswith("?"):
            return self.names[argument]
        return f"C[{self.constants[argument]}]"

    def is_bound(self, argument: str) -> bool:
        """Return whether an argument is an object or a bound variable."""
        return not argument.startswith("?") or argument in self.names

    def test(self, atom: Atom) -> str:
        """Return the Python expression of a literal whose arguments are all bound."""
        values = [self.value(argument) for argument in atom.arguments]
        if atom.predicate == "=":
            return f"{values[0]} {'==' if atom.positive else '!='} {values[1]}"
        self.reads.add(atom.predicate)
        word = "in" if atom.positive else "not in"
        if len(values) < 2:
            slot = self.schema.slot(atom.predicate, None, len(values))
            return f"{values[0] if values else '()'} {word} S[{slot}]"
        keys = tuple(range(len(values) - 1))
        return f"{values[-1]} {word} {self._lookup(atom.predicate, keys, values[:-1], len(values))}"

    def _lookup(self, predicate: str, bound: tuple[int, ...], values: Sequence[str], arity: int) -> str:
        slot = self.schema.slot(predicate, bound, arity)
        if not bound:
            return f"S[{slot}]"
        key = values[0] if len(values) == 1 else f"({', '.join(values)})"
        return f"S[{slot}].get({key}, ())"

    def type_test(self, name: str, kind: str) -> str:
        """Return the Python expression that tests the type of an object."""
        self.reads.add(TYPE + kind)
        return f"{name} in S[{self.schema.slot(TYPE + kind, None, 1)}]"

    def expression(self, formula: Formula) -> str:
        """Return the Python expression of a formula whose free variables are all bound."""
        if isinstance(formula, Atom):
            return self.test(formula)
        if isinstance(formula, Junction):
            parts = [self.expression(part) for part in formula.parts]
            return f"({f' {formula.kind} '.join(parts)})" if parts else str(formula.kind == "and")
        loops = []
        for variable, kind in formula.variables:
            self.names[variable] = self.new_variable()
            loops.append(f"for {self.names[variable]} in {self._lookup(TYPE + kind, (), (), 1)}")
            self.reads.add(TYPE + kind)
        word = "any" if formula.kind == "exists" else "all"
        return f"{word}({self.expression(formula.body)} {' '.join(loops)})"

    def bind(self, atom: Atom, kinds: Mapping[str, str], distinct: bool = False) -> None:
        """Open a loop over the facts that match `atom` and bind its variables, or a test if none is free."""
        if all(self.is_bound(argument) for argument in atom.arguments):
            self.open(f"if {self.test(atom)}:")
            return
        self.reads.add(atom.predicate)
        bound = tuple(i for i, name in enumerate(atom.arguments) if self.is_bound(name))
        lookup = self._lookup(
            atom.predicate, bound, [self.value(atom.arguments[i]) for i in bound], len(atom.arguments)
        )
        known, targets, tests = list(self.names.values()), [], []
        for place, argument in enumerate(atom.arguments):
            if place in bound:
                continue
            name = self.new_variable()
            targets.append(name)
            if argument in self.names:
                tests.append(f"{name} == {self.names[argument]}")
                continue
            if distinct:
                tests += [f"{name} != {other}" for other in known]
            known.append(name)
            self.names[argument] = name
            if not self._implied(atom.predicate, place, kinds[argument]):
                tests.append(self.type_test(name, kinds[argument]))
        self.open(f"for {', '.join(targets)} in {lookup}:")
        if tests:
            self.open(f"if {' and '.join(tests)}:")

    def _implied(self, predicate: str, place: int, kind: str) -> bool:
        declared = self.schema.types_of(predicate)[place]
        return predicate not in self.untrusted and self.schema.domain.is_a(declared, kind)

    def scan(self, variable: str, kind: str) -> None:
        """Open a loop over all objects of a type."""
        self.bind(Atom(TYPE + kind, (variable,)), {variable: kind})

    def join(self, formula: Formula, kinds: dict[str, str], fluents: frozenset[str]) -> None:
        """Open loops over the values of the variables in `kinds` (name to type) for which `formula` holds."""
        pending = _conjuncts(formula, kinds)
        while True:
            ready = [part for part in pending if all(self.is_bound(name) for name in free_variables(part))]
            pending = [part for part in pending if part not in ready]
            if ready:
                self.open(f"if {' and '.join(self.expression(part) for part in ready)}:")
            loops = [p for p in pending if isinstance(p, Atom) and p.positive and p.predicate != "="]
            if loops:
                best = min(loops, key=lambda atom: self._cost(atom, fluents))
                self.bind(best, kinds)
                pending.remove(best)
                continue
            unbound = [name for name in kinds if name not in self.names]
            if not unbound:
                break
            self.scan(unbound[0], kinds[unbound[0]])

    def _cost(self, atom: Atom, fluents: frozenset[str]) -> tuple[bool, bool, int]:
        """Return the cost of a loop: atoms with a bound argument first, then predicates that change."""
        # Predicates that change have few facts.
        free = sum(not self.is_bound(argument) for argument in atom.arguments)
        return free == len(atom.arguments), atom.predicate not in fluents, free


def _conjuncts(formula: Formula, kinds: dict[str, str]) -> list[Formula]:
    """Split a conjunction and add the variables of its `exists` parts to `kinds`."""
    if isinstance(formula, Junction) and formula.kind == "and":
        return [conjunct for part in formula.parts for conjunct in _conjuncts(part, kinds)]
    if isinstance(formula, Quantified) and formula.kind == "exists":
        kinds.update(formula.variables)
        return _conjuncts(formula.body, kinds)
    return [formula]


def free_variables(formula: Formula) -> set[str]:
    """Return the variables of a formula that no quantifier inside it binds."""
    if isinstance(formula, Atom):
        return {name for name in formula.arguments if name.startswith("?")}
    if isinstance(formula, Junction):
        return set[str]().union(*(free_variables(part) for part in formula.parts))
    return free_variables(formula.body) - {name for name, _ in formula.variables}
