"""Parse the PDDL of a game: its domain (types, predicates, actions) and problem (objects, facts, goal)."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agentrl.errors import AgentRLError

Expression = str | list["Expression"]


class GameFileError(AgentRLError, ValueError):
    """A game file is malformed or unsupported."""


class PddlError(GameFileError):
    """The PDDL of a game is malformed, or uses something undeclared or unsupported."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A literal such as `(not (opened ?r))`; variables start with a question mark."""

    predicate: str
    arguments: tuple[str, ...]
    positive: bool = True


@dataclass(frozen=True, slots=True)
class Junction:
    """`and` or `or` over parts; an empty `and` is true, an empty `or` is false."""

    kind: str
    parts: tuple["Formula", ...]


@dataclass(frozen=True, slots=True)
class Quantified:
    """`exists` or `forall` over typed variables, whose names are unique within the formula."""

    kind: str
    variables: tuple[tuple[str, str], ...]
    body: "Formula"


Formula = Atom | Junction | Quantified
TRUE = Junction("and", ())


@dataclass(frozen=True, slots=True)
class Effect:
    """A literal that becomes true for all values of `variables` for which `condition` holds."""

    variables: tuple[tuple[str, str], ...]
    condition: Formula
    literal: Atom


@dataclass(frozen=True, slots=True)
class Action:
    """An operator schema."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    precondition: Formula
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """The rules that the games of one domain share.

    `ancestors` maps a type to itself and all its supertypes; `predicates` maps a name to its argument types.
    """

    ancestors: Mapping[str, frozenset[str]]
    predicates: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, str]
    actions: tuple[Action, ...]

    def is_a(self, kind: str, wanted: str) -> bool:
        """Return whether every object of type `kind` is of type `wanted`; an undeclared type is empty."""
        return kind not in self.ancestors or wanted in self.ancestors[kind]


@dataclass(frozen=True, slots=True)
class Problem:
    """One game's objects, initial facts and goal.

    Objects are numbered in the order of their names; `types[n]` is the type of `objects[n]`, and `number`
    maps a name to its number. `facts` maps a predicate to the sorted rows for which it is true.
    """

    objects: tuple[str, ...]
    types: tuple[str, ...]
    number: Mapping[str, int]
    facts: Mapping[str, list[tuple[int, ...]]]
    goal: Formula


def read_expression(text: str) -> list[Expression]:
    """Parse one parenthesised expression; `;` starts a comment, and case is ignored."""
    if ";" in text:
        text = re.sub(r";[^\n]*", "", text)
    if not text.isascii():
        raise PddlError(f"PDDL contains a non-ASCII character: {next(c for c in text if ord(c) > 127)!r}")
    for sign in "()":
        text = text.replace(sign, f" {sign} ")
    tokens = text.lower().replace("?", " ?").split()
    root: list[Expression] = []
    stack, current = [], root
    for token in tokens:
        if token == "(":
            inner: list[Expression] = []
            current.append(inner)
            stack.append(current)
            current = inner
        elif token == ")":
            if not stack:
                raise PddlError("PDDL has a ')' without its '('")
            current = stack.pop()
        else:
            current.append(token)
    if stack:
        raise PddlError(f"PDDL ends inside {len(stack)} open parentheses")
    if len(root) != 1 or not isinstance(root[0], list):
        raise PddlError(f"PDDL must be one '(define ...)', found {len(root)} expressions")
    return root[0]


def typed_list(items: Sequence[Expression], default: str = "object") -> list[tuple[str, str]]:
    """Parse `a b - t c` into [(a, t), (b, t), (c, default)]."""
    result: list[tuple[str, str]] = []
    waiting: list[str] = []
    stream = iter(items)
    for item in stream:
        if not isinstance(item, str):
            raise PddlError(f"a list of names contains the expression {item!r}")
        if item == "-":
            kind = next(stream, None)
            if not isinstance(kind, str):
                raise PddlError(f"a type name must follow '-' after {waiting}, found {kind!r}")
            result += [(name, kind) for name in waiting]
            waiting = []
        else:
            waiting.append(item)
    return result + [(name, default) for name in waiting]


class _Conditions:
    """Parser of conditions into negation normal form; it gives every quantified variable a unique name."""

    def __init__(self, predicates: Mapping[str, tuple[str, ...]], place: str) -> None:
        self.predicates = predicates
        self.place = place
        self.fresh = 0

    def read(self, source: Expression, scope: Mapping[str, str], positive: bool = True) -> Formula:
        if not isinstance(source, list):
            raise PddlError(f"{self.place}: {source!r} is not a condition")
        if not source:
            return Junction("and" if positive else "or", ())
        head = source[0]
        if head == "not":
            return self.read(self._only(source, 2)[1], scope, not positive)
        if head in ("and", "or"):
            kind = head if positive else {"and": "or", "or": "and"}[str(head)]
            return _junction(str(kind), [self.read(part, scope, positive) for part in source[1:]])
        if head == "imply":
            _, left, right = self._only(source, 3)
            parts = [self.read(left, scope, not positive), self.read(right, scope, positive)]
            return _junction("or" if positive else "and", parts)
        if head in ("exists", "forall"):
            _, variables, body = self._only(source, 3)
            return self._quantified(str(head), variables, body, scope, positive)
        return self.atom(source, scope, positive)

    def _only(self, source: list[Expression], length: int) -> list[Expression]:
        if len(source) != length:
            raise PddlError(f"{self.place}: '{source[0]}' takes {length - 1} parts, found {len(source) - 1}")
        return source

    def _quantified(
        self, head: str, variables: Expression, body: Expression, scope: Mapping[str, str], positive: bool
    ) -> Formula:
        inner, renamed = self._renamed(head, variables, scope)
        kind = head if positive else {"exists": "forall", "forall": "exists"}[head]
        return Quantified(kind, renamed, self.read(body, inner, positive))

    def _renamed(
        self, head: str, variables: Expression, scope: Mapping[str, str]
    ) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
        if not isinstance(variables, list):
            raise PddlError(f"{self.place}: '{head}' needs a list of variables, found {variables!r}")
        inner, renamed = dict(scope), []
        for name, kind in typed_list(variables):
            self.fresh += 1
            inner[name] = f"{name}'{self.fresh}"
            renamed.append((inner[name], kind))
        return inner, tuple(renamed)

    def atom(self, source: Expression, scope: Mapping[str, str], positive: bool = True) -> Atom:
        if not isinstance(source, list) or not source or not all(isinstance(item, str) for item in source):
            raise PddlError(f"{self.place}: {source!r} is not an atom")
        predicate, *arguments = map(str, source)
        wanted = 2 if predicate == "=" else len(self.predicates.get(predicate, ()))
        if predicate != "=" and predicate not in self.predicates:
            raise PddlError(f"{self.place}: predicate '{predicate}' is not declared")
        if len(arguments) != wanted:
            raise PddlError(f"{self.place}: '{predicate}' takes {wanted} arguments, found {len(arguments)}")
        unknown = [name for name in arguments if name.startswith("?") and name not in scope]
        if unknown:
            raise PddlError(f"{self.place}: variable {unknown[0]} is not declared")
        return Atom(predicate, tuple(scope.get(name, name) for name in arguments), positive)

    def effects(self, source: Expression, scope: Mapping[str, str]) -> Iterator[Effect]:
        if not isinstance(source, list):
            raise PddlError(f"{self.place}: {source!r} is not an effect")
        head = source[0] if source else "and"
        if head == "and":
            for part in source[1:]:
                yield from self.effects(part, scope)
        elif head == "forall":
            _, variables, body = self._only(source, 3)
            inner, renamed = self._renamed("forall", variables, scope)
            for effect in self.effects(body, inner):
                yield Effect(renamed + effect.variables, effect.condition, effect.literal)
        elif head == "when":
            _, condition, body = self._only(source, 3)
            guard = self.read(condition, scope)
            for effect in self.effects(body, scope):
                yield Effect(effect.variables, _junction("and", [guard, effect.condition]), effect.literal)
        elif head == "not":
            yield Effect((), TRUE, self.atom(self._only(source, 2)[1], scope, False))
        elif head != "increase":
            yield Effect((), TRUE, self.atom(source, scope))


def _junction(kind: str, parts: Iterable[Formula]) -> Formula:
    """Build a junction: flatten nested ones of the same kind, and return a single part by itself."""
    flat: list[Formula] = []
    for part in parts:
        flat += part.parts if isinstance(part, Junction) and part.kind == kind else [part]
    return flat[0] if len(flat) == 1 else Junction(kind, tuple(flat))


def _sections(expression: list[Expression], what: str) -> Iterator[list[Expression]]:
    if not expression or expression[0] != "define":
        raise PddlError(f"the {what} must start with '(define'")
    for section in expression[1:]:
        if not isinstance(section, list) or not section or not isinstance(section[0], str):
            raise PddlError(f"the {what} contains {str(section)[:60]!r}, wanted a section")
        yield section


def _ancestors(types: Sequence[tuple[str, str]]) -> dict[str, frozenset[str]]:
    parents: dict[str, set[str]] = {"object": {"object"}}
    for name, parent in types:
        parents.setdefault(name, {name, "object"}).add(parent)
    for parent in {parent for _, parent in types} - set(parents):
        raise PddlError(f"the domain: type '{parent}' is not declared")
    for _ in parents:
        for name, known in parents.items():
            parents[name] = known.union(*(parents[other] for other in known))
    return {name: frozenset(known) for name, known in parents.items()}


def parse_domain(text: str) -> Domain:
    """Parse a domain file.

    Raises:
        PddlError: Something is malformed or undeclared, or a predicate is derived.
    """
    types: list[tuple[str, str]] = []
    constants: dict[str, str] = {}
    predicates: dict[str, tuple[str, ...]] = {}
    actions: list[Action] = []
    for section in _sections(read_expression(text), "domain"):
        head, *rest = section
        if head == ":types":
            types = typed_list(rest)
        elif head == ":constants":
            constants = dict(typed_list(rest))
        elif head == ":predicates":
            for item in rest:
                if not isinstance(item, list) or not item:
                    raise PddlError(f"the domain declares the predicate {item!r}")
                predicates[str(item[0])] = tuple(kind for _, kind in typed_list(item[1:]))
        elif head == ":action":
            action = _read_action(rest, predicates)
            if action.effects:
                actions.append(action)
        elif head not in ("domain", ":requirements", ":functions"):
            raise PddlError(f"the domain: section '{head}' is not supported")
    return Domain(_ancestors(types), predicates, constants, tuple(actions))


def _read_action(rest: list[Expression], predicates: Mapping[str, tuple[str, ...]]) -> Action:
    name = str(rest[0]) if rest else "?"
    parts = {str(key): value for key, value in zip(rest[1::2], rest[2::2], strict=False)}
    unknown = set(parts) - {":parameters", ":precondition", ":effect"}
    if unknown or ":effect" not in parts or len(rest) % 2 == 0:
        raise PddlError(
            f"action {name}: wanted :parameters, :precondition and :effect, found {sorted(parts)}"
        )
    listed = parts.get(":parameters", [])
    if not isinstance(listed, list):
        raise PddlError(f"action {name}: :parameters must be a list, found {listed!r}")
    parameters = tuple(typed_list(listed))
    scope = {variable: variable for variable, _ in parameters}
    reader = _Conditions(predicates, f"action {name}")
    precondition = reader.read(parts.get(":precondition", []), scope)
    return Action(name, parameters, precondition, tuple(reader.effects(parts[":effect"], scope)))


def parse_problem(text: str, domain: Domain) -> Problem:
    """Parse a problem file for a domain.

    Raises:
        PddlError: Something is malformed, undeclared, missing, or has the wrong number of arguments.
    """
    objects = dict(domain.constants)
    init: list[Expression] = []
    goal: Expression | None = None
    for section in _sections(read_expression(text), "problem"):
        head = section[0]
        if head == ":objects":
            _declare(typed_list(section[1:]), objects, domain)
        elif head == ":init":
            init = section[1:]
        elif head == ":goal":
            if len(section) != 2:
                raise PddlError(f"the problem: ':goal' takes one condition, found {len(section) - 1}")
            goal = section[1]
        elif head not in ("problem", ":domain", ":requirements", ":metric"):
            raise PddlError(f"the problem: section '{head}' is not supported")
    if goal is None:
        raise PddlError("the problem has no ':goal'")
    names = tuple(sorted(objects))
    number = {name: place for place, name in enumerate(names)}
    facts = _read_facts(init, number, domain)
    return Problem(
        names, tuple(objects[name] for name in names), number, facts, _read_goal(goal, number, domain)
    )


def parse_goal(text: str, number: Mapping[str, int], domain: Domain) -> Formula:
    """Parse the end of a problem file, from `(:goal` to the parenthesis that closes the problem."""
    for section in _sections(read_expression(f"(define {text}"), "goal"):
        if section[0] == ":goal" and len(section) == 2:
            return _read_goal(section[1], number, domain)
    raise PddlError("the goal must be '(:goal CONDITION)'")


def _read_goal(goal: Expression, number: Mapping[str, int], domain: Domain) -> Formula:
    formula = _Conditions(domain.predicates, "the goal").read(goal, {})
    for name in constants_of(formula):
        if name not in number:
            raise PddlError(f"the goal: object '{name}' is not declared")
    return formula


def _declare(items: list[tuple[str, str]], objects: dict[str, str], domain: Domain) -> None:
    for name, kind in items:
        if name in objects:
            raise PddlError(f"the problem declares object '{name}' twice")
        if kind not in domain.ancestors:
            raise PddlError(f"the problem: object '{name}' has the undeclared type '{kind}'")
        objects[name] = kind


def _read_facts(
    init: list[Expression], number: Mapping[str, int], domain: Domain
) -> dict[str, list[tuple[int, ...]]]:
    facts: dict[str, set[tuple[int, ...]]] = {}
    for item in init:
        predicate = item[0] if isinstance(item, list) and item else None
        if not isinstance(predicate, str):
            raise PddlError(f"the problem: {item!r} in ':init' is not a fact")
        arguments = item[1:]
        if predicate in ("=", "not"):
            continue
        if predicate not in domain.predicates:
            raise PddlError(f"the problem: predicate '{predicate}' is not declared")
        wanted = len(domain.predicates[predicate])
        if len(arguments) != wanted:
            raise PddlError(f"the problem: '{predicate}' takes {wanted} arguments, found {len(arguments)}")
        try:
            row = tuple([number[name] for name in arguments])  # type: ignore[index]
        except (KeyError, TypeError) as error:
            raise PddlError(f"the problem: {error} in '{predicate}' is not a declared object") from error
        facts.setdefault(predicate, set()).add(row)
    return {predicate: sorted(found) for predicate, found in facts.items()}


def constants_of(formula: Formula) -> list[str]:
    """Return the objects that a formula names, in the order of their first appearance."""
    found: dict[str, None] = {}
    for atom in atoms_of(formula):
        found.update(dict.fromkeys(name for name in atom.arguments if not name.startswith("?")))
    return list(found)


def atoms_of(formula: Formula) -> Iterator[Atom]:
    """Yield every literal of a formula."""
    if isinstance(formula, Atom):
        yield formula
    elif isinstance(formula, Junction):
        for part in formula.parts:
            yield from atoms_of(part)
    else:
        yield from atoms_of(formula.body)
