"""The text grammar: parsing, writing and errors."""

import pytest

from agentrl_envs.alfworld.engine import Game
from agentrl_envs.alfworld.grammar import GrammarError, Part, parse_grammar, parse_query, split_text
from agentrl_envs.alfworld.package_data import load_package_data

DOMAIN = """(define (domain shelf) (:types box thing)
  (:predicates (in ?t - thing ?b - box) (near ?t - thing ?u - thing) (wet ?t - thing))
  (:action wash :parameters (?t - thing ?b - box) :precondition (in ?t ?b) :effect (wet ?t))
  (:action drop :parameters (?t - thing ?b - box) :precondition (in ?t ?b) :effect (not (in ?t ?b))))"""
PROBLEM = """(define (problem one) (:domain shelf)
  (:objects pen_bar_1 pen_bar_2 cup_bar_1 - thing red_bar_1 blue_bar_1 - box)
  (:init (in pen_bar_1 red_bar_1) (in pen_bar_2 red_bar_1) (in cup_bar_1 red_bar_1)
         (near pen_bar_1 pen_bar_1) (near pen_bar_1 cup_bar_1))
  (:goal (wet cup_bar_1)))"""
LISTS = (
    '"list_empty": [{"rhs": "nothing"}], "list_separator": [{"rhs": ", "}], '
    '"list_last_separator": [{"rhs": ", and "}]'
)


def opening(text: str, rules: str = "") -> str:
    """Return the opening of a game with the text `text` and the given rules."""
    rules = f'{{"intro": [{{"rhs": "{text}"}}], {rules} {LISTS}}}'
    grammar = f'''grammar :: """{rules}""";
      action wash {{ template :: "wash {{t}}"; feedback :: "{{t.name}} is wet"; }}
      action drop {{ template :: "drop {{t.name}} of {{b}}"; feedback :: "dropped"; }}'''
    return Game(DOMAIN, PROBLEM, grammar).start.observation


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain", "plain"),
        ("[{t.name | in(t:thing, b:box)}]", "cup 1, pen 2, and pen 1"),
        ("{t.indefinite + ' ' + t.name | in(t:thing, b:box)}", "a cup 1a pen 2a pen 1"),
        ("[{t.name | near(t:thing, u:thing)}]", "pen 2"),
        ("[{t | wet(t:thing)}]", "nothing"),
        ("[{t.name or t.id | near(t:thing, u:thing) & in(u:thing, b:box)}]!", "pen 2!"),
        ("  \\n  lead", "lead"),
        ("// gone\\nkept // kept", "kept // kept"),
        ("say 'x; never", "say 'x"),
        ('\\"quoted\\" end', "quoted end"),
        ("a | b", "a "),
        ("", ""),
    ],
)
def test_a_text_is_written_as_textworld_writes_it(text: str, written: str) -> None:
    assert opening(text) == written


def test_distinct_placeholders_never_take_one_object() -> None:
    # near(pen 2, pen 2) is a fact, and the only other one is near(pen 2, cup 1).
    assert opening("[{t.name + u.name | near(t:thing, u:thing)}]") == "pen 2cup 1"


def test_the_first_alternative_whose_condition_holds_is_used() -> None:
    rules = """"state": [{"condition": "wet(t:thing)", "rhs": "wet"},
        {"condition": "in(t:thing, b:box)", "rhs": "dry"}],"""
    assert opening("#state#", rules) == "dry"


def test_a_fact_counts_as_false_only_after_it_was_deleted() -> None:
    rules = """{"intro": [{"rhs": "#out#"}],
        "out": [{"condition": "not_in(x:thing, y:box)", "rhs": "out: {x.name | not_in(x:thing, y:box)}"},
                {"rhs": "all in"}]}"""
    grammar = f'''grammar :: """{rules}""";
      action wash {{ template :: "wash {{t}}"; feedback :: "#out#"; }}
      action drop {{ template :: "drop {{t}}"; feedback :: "dropped"; }}'''
    game = Game(DOMAIN, PROBLEM, grammar)
    assert game.start.observation == "all in"
    assert game.advance(game.start, "wash cup 1").observation == "all in"
    dropped = game.advance(game.start, "drop cup 1")
    # The command binds the box, so no other placeholder may bind it.
    assert game.advance(dropped, "wash pen 1").observation == "all in"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{__import__('os').name}", "uses more than names"),
        ("{t.name.upper() | in(t:thing, b:box)}", "uses more than names"),
        ("{x.name | in(t:thing, b:box)}", "nothing is called 'x'"),
        ("{t.name | on(t:thing)}", "predicate 'on' is not declared"),
        ("{t.name | in(t:thing)}", "'in' takes 2 arguments"),
        ("{t.name | in(t:thing, b:box}", "not an atom of a query"),
        ("{1 + 1}", "uses more than names"),
        ("#nowhere#", "the rule 'nowhere' does not exist"),
        ("{a b}", "not an expression"),
    ],
)
def test_what_a_text_may_not_say_is_refused_when_the_game_is_loaded(text: str, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        opening(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nonsense", "is malformed after line 1: 'nonsense'"),
        ('grammar :: """{"a": [}""";', "not JSON"),
        ('grammar :: """{"a": 3}""";', "not JSON of rules"),
        ('grammar :: """{}', "is not closed"),
        ('# remark\n\naction go { template :: "go"; }', "needs a template and a feedback"),
        ('action go { template :: "go"; feedback :: "#x#"; ', "is malformed"),
    ],
)
def test_a_malformed_grammar_is_refused_with_its_place(source: str, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        parse_grammar(source)
    assert message in str(caught.value)


def test_later_blocks_replace_rules_and_remarks_are_dropped() -> None:
    grammar = parse_grammar(
        '''# a remark
        grammar :: """{"x": [{"rhs": "one"}], "y": [{"rhs": "kept"}]}""";
        action Go { template :: "go"; pddl :: """ignored"""; feedback :: "#x#"; # another
          grammar :: """{
            # inside an action's block, such lines are dropped
            "x": [{"rhs": "two", "condition": "p(a:b)"}]}"""; }'''
    )
    assert grammar.actions["go"] == ("go", "#x#")
    assert grammar.rules["x"] == (("p(a:b)", "two"),)
    assert grammar.rules["y"] == (("", "kept"),)


def test_texts_and_queries_are_cut_into_their_parts() -> None:
    assert split_text("at [{#name(r)# | p(r:box)}], {r.id}") == (
        Part("literal", "at "),
        Part("list", "name(r)", True, "p(r:box)"),
        Part("literal", ", "),
        Part("repeat", "r.id"),
    )
    assert parse_query("p(a:x) & q(a:x, b)") == (("p", (("a", "x"),)), ("q", (("a", "x"), ("b", "b"))))


def test_a_command_must_not_depend_on_what_changes() -> None:
    data = load_package_data()
    grammar = data.grammar.replace('"open {r}"', '"open {r | opened(r:receptacle)}"')
    with pytest.raises(GrammarError, match="depends on 'opened', which changes"):
        Game(data.domain, "(define (problem p) (:domain d) (:objects) (:init) (:goal (and)))", grammar)
