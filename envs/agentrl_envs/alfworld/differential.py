"""Differential test: run the same commands on our engine and on TextWorld's and compare all outputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentrl_envs.alfworld.adversarial_games import files
from agentrl_envs.alfworld.engine import Game, GameState
from agentrl_envs.alfworld.grammar import Part, split_text
from agentrl_envs.alfworld.pddl import GameFileError
from agentrl_envs.alfworld.reference import ReferenceEngine

INVALID = (
    *("", " ", "\n", "LOOK", "Look", "look around", '"look"', "#look#", "//look", "{r}", "[x]", "quit"),
    *("take", "go to", "go to nowhere 1", "use knife 1", "take a mug 1 from the desk 1", "examine agent1"),
    *("go to desk 1, and open it", "inventory; look", "put mug 1 in desk 1"),
)


@dataclass(slots=True)
class Tally:
    """Counts of the comparisons, and one sentence per difference."""

    games: int = 0
    refused_by_both: int = 0
    comparisons: int = 0
    steps: int = 0
    verbs: Counter[str] = field(default_factory=Counter)
    task_types: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def compare(self, place: str, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
        """Count a comparison of two outputs and record their differences."""
        self.comparisons += 1
        names = ("observation", "admissible", "won", "moves", "score", "done")
        for name, left, right in zip(names, ours, theirs, strict=True):
            if left != right:
                self.differences.append(f"{place}: {name}: ours {left!r}, TextWorld's {right!r}")


def compare_game(
    engine: ReferenceEngine, name: str, file: Mapping[str, Any], tally: Tally, *, steps: int, seed: int
) -> None:
    """Play one game on both engines: mixed commands with resets, the walkthrough, and commands after it."""
    rng = Random(f"differential {seed} {name}")
    game, error = _try(lambda: Game(file["pddl_domain"], file["pddl_problem"], file["grammar"]))
    if game is not None and game.start.won:
        return  # TextWorld's translator cannot read a goal that already holds
    theirs, their_error = _try(lambda: engine.begin(file))
    if game is None or theirs is None:
        if (game is None) != (theirs is None):
            tally.differences.append(f"{name}: ours {error or 'loads'}, TextWorld {their_error or 'loads'}")
        tally.refused_by_both += game is None and theirs is None
        return
    tally.games += 1
    ours = game.start
    _compare_start(tally, name, ours, theirs)
    plan = tuple(file["walkthrough"])
    for number in range(steps):
        if rng.random() < 0.02:
            ours = game.start
            _compare_start(tally, f"{name}, reset before step {number}", ours, engine.reset())
        ours = _step_both(engine, game, ours, _mixed(rng, ours, plan), tally, f"{name}, step {number}")
    ours = game.start
    _compare_start(tally, f"{name}, second reset", ours, engine.reset())
    for command in plan:
        ours = _step_both(engine, game, ours, command, tally, f"{name}, walkthrough")
    for _ in range(8):
        ours = _step_both(engine, game, ours, _mixed(rng, ours, plan), tally, f"{name}, after done")


def _try(make: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return make(), None
    except (GameFileError, Exception, SystemExit) as error:  # TextWorld raises many kinds of errors
        return None, f"refuses ({type(error).__name__}: {str(error)[:80]})"


def _compare_start(tally: Tally, place: str, ours: GameState, theirs: GameState) -> None:
    tally.compare(place, (*_shown(ours), 0, False), (*_shown(theirs), 0, False))


def _shown(state: GameState) -> tuple[Any, ...]:
    return state.observation, state.admissible, state.won, state.moves


def _step_both(
    engine: ReferenceEngine, game: Game, ours: GameState, command: str, tally: Tally, place: str
) -> GameState:
    tally.steps += 1
    tally.verbs[command.split()[0] if command in ours.admissible else "invalid"] += 1
    after = game.advance(ours, command)
    theirs, score, done = engine.step(command)
    tally.compare(
        f"{place}, {command!r}", (*_shown(after), int(after.won), after.won), (*_shown(theirs), score, done)
    )
    return after


def _mixed(rng: Random, state: GameState, plan: tuple[str, ...]) -> str:
    draw = rng.random()
    if draw < 0.45:
        verbs: dict[str, list[str]] = {}
        for command in state.admissible:
            verbs.setdefault(command.split()[0], []).append(command)
        return rng.choice(verbs[rng.choice(sorted(verbs))])
    if draw < 0.65:
        return rng.choice(state.admissible)
    if draw < 0.8 and plan:
        return rng.choice(plan)
    if draw < 0.9:
        return rng.choice(INVALID)
    if draw < 0.93:
        return rng.choice([" {} ", "{}\n", "{}  "]).format(rng.choice(state.admissible))
    return rng.choice(("help", "look", "inventory"))


_PIECES = (
    *("a", "b.", "...", "é", " ", "\n", ".\n", "\\n", "\t", "//", "/", '"', '"x y"', "'", ";", "|", "<", ">"),
    *(
        "[",
        "]",
        "{",
        "}",
        "#",
        "#look#",
        "#a(b)#",
        "{ r }",
        "{r.name}",
        '{"x" + r.name}',
        "[{o.id | p(o:x)}]",
    ),
    *("{#q(o)# | p(o:x)}", "{r.name |p(a:b) & q(c:d)}", " {r.name or r.id | p(r:x) }"),
)


def compare_texts(count: int, seed: int = 0) -> Tally:
    """Split random texts into parts with both parsers and compare the parts."""
    from textworld.envs.pddl import textgen

    rng, tally = Random(seed), Tally()
    for _ in range(count):
        text = "".join(rng.choice(_PIECES) for _ in range(rng.randrange(8)))
        parsed = textgen._parse_and_convert(text, rule_name="symbols")
        theirs = _joined(_as_part(symbol) for symbol in parsed)
        tally.comparisons += 1
        if _joined(split_text(text)) != theirs:
            tally.differences.append(f"{text!r}: ours {split_text(text)}, TextWorld's {theirs}")
    return tally


def _as_part(symbol: Any) -> Part:
    kind = type(symbol).__name__
    if kind in ("TerminalSymbol", "NonterminalSymbol"):
        return Part("literal" if kind == "TerminalSymbol" else "rule", symbol.symbol)
    inner = symbol.symbol if kind == "ListSymbol" else symbol
    is_rule = type(inner.expression).__name__ == "NonterminalSymbol"
    query = (inner.given or "").strip()
    return Part("list" if kind == "ListSymbol" else "repeat", inner.expression.symbol, is_rule, query)


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Merge adjacent literals, which the two parsers split in different places."""
    joined: list[Part] = []
    for part in parts:
        if part.kind == "literal" and joined and joined[-1].kind == "literal":
            joined[-1] = Part("literal", joined[-1].content + part.content)
        elif part != Part("literal", ""):
            joined.append(part)
    return joined


def run(
    count: int, *, steps: int, seed: int = 0, adversarial: bool = False, report: Callable[[str], None] = print
) -> Tally:
    """Compare the engines on `count` games; `report` is called with one line per game."""
    engine = ReferenceEngine()
    tally = Tally()
    try:
        for name, task_type, file in files(count, seed, adversarial):
            before = tally.comparisons
            compare_game(engine, name, file, tally, steps=steps, seed=seed)
            made = tally.comparisons - before
            tally.task_types[task_type] += made > 0
            report(f"{name} {task_type}: {made} comparisons, {len(tally.differences)} differences so far")
    finally:
        engine.close()
    return tally
