import unicodedata
import warnings

import pytest

from agentrl.policy.trie import MOST_WARNINGS, ChoiceError, TokenTrie, admissible_replies, token_trie

# take mug 1 <end> | take mug 2 <end> | take desk <end> | go <end>
MENU = ((5, 6, 1, 9), (5, 6, 2, 9), (5, 7, 9), (8, 9))


def test_a_decision_lists_every_id_that_continues_a_choice() -> None:
    trie = TokenTrie(MENU)
    assert trie.allowed(()) == (5, 8)
    assert trie.allowed((5,)) == (6, 7)
    assert trie.allowed((5, 6)) == (1, 2)
    assert trie.allowed((8,)) == (9,)
    assert trie.allowed((8, 9)) == ()


def test_forced_runs_end_at_a_decision_or_at_the_end_of_the_reply() -> None:
    trie = TokenTrie(((3, 4, 5, 9), (3, 4, 6, 7, 9)))
    assert trie.forced == (3, 4)
    assert trie.run(()) == (3, 4)
    assert trie.run((3, 4, 6)) == (7, 9)
    assert trie.run((3, 4)) == ()


def test_a_single_choice_is_forced_throughout() -> None:
    trie = TokenTrie(((4, 5, 9),))
    assert trie.root is None
    assert trie.forced == (4, 5, 9)
    assert trie.trace((4, 5, 9)) == ((4,), (5,), (9,))


def test_a_trace_holds_the_allowed_ids_of_every_token() -> None:
    trie = TokenTrie(MENU)
    assert trie.trace((5, 6, 2, 9)) == ((5, 8), (6, 7), (1, 2), (9,))
    assert trie.trace((5, 6)) == ((5, 8), (6, 7))


@pytest.mark.parametrize("ids", [(7,), (5, 9), (8, 9, 9), (8, 3)])
def test_a_reply_that_is_not_a_choice_cannot_be_traced(ids: tuple[int, ...]) -> None:
    with pytest.raises(ChoiceError):
        TokenTrie(MENU).trace(ids)


def test_the_order_and_repetition_of_choices_change_nothing() -> None:
    shuffled = TokenTrie((MENU[2], MENU[0], MENU[3], MENU[0], MENU[1]))
    assert shuffled.trace(MENU[1]) == TokenTrie(MENU).trace(MENU[1])


@pytest.mark.parametrize(
    ("choices", "words"), [((), "empty"), (((),), "no tokens"), (((5, 9), (5, 9, 4)), "is a prefix of")]
)
def test_choices_that_cannot_be_decoded_are_refused(choices: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ChoiceError, match=words):
        TokenTrie(choices)


def test_the_same_menu_is_built_once() -> None:
    assert token_trie(MENU) is token_trie(tuple(choice[:1] + choice[1:] for choice in MENU))


def test_actions_that_are_written_alike_mean_the_first_and_are_warned_of_once() -> None:
    def encode(text: str) -> tuple[int, ...]:
        return (*map(ord, unicodedata.normalize("NFC", text.strip().lower())), 0)

    composed, decomposed = "open caf\u00e9", "open cafe\u0301"
    with pytest.warns(RuntimeWarning) as told:
        replies = admissible_replies([composed, "go", decomposed, " Go", "go"], encode)
    assert list(replies.values()) == [composed, "go"]
    assert replies[encode(decomposed)] == composed
    assert [str(each.message).split(" are ")[0] for each in told] == [
        f"the actions '{composed}' ('open caf\\xe9') and '{decomposed}' ('open cafe\\u0301')",
        "the actions 'go' ('go') and ' Go' (' Go')",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(admissible_replies([decomposed, composed], lambda text: (ord(text[-1]), 0)).values()) == [
            decomposed,
            composed,
        ]
        admissible_replies([composed, decomposed], encode)


def test_only_the_first_few_pairs_of_actions_are_warned_of() -> None:
    def encode(text: str) -> tuple[int, ...]:
        return (int(text), 0)

    pairs = [f"{zero}{number}" for number in range(20) for zero in ("", "0")]
    with pytest.warns(RuntimeWarning) as told:
        replies = admissible_replies(pairs, encode)
    assert list(replies.values()) == pairs[::2]
    assert len(told) == MOST_WARNINGS == 5
