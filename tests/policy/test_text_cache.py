"""Caches are bounded by the bytes that they hold, whatever the length of texts and replies."""

import copy
import random
import sys
import tracemalloc

import pytest
from transformers import PreTrainedTokenizerFast

from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.dialogue import ParsedReply
from agentrl.policy.text_cache import CACHED_BYTES, ENTRY_BYTES, TextCache, size_of
from agentrl.policy.tokens import RoleDialogue
from agentrl.policy.trie import TRIES, TokenTrie, _trie_bytes, token_trie

REWRITING = (
    "{% for m in messages %}{{ m.role }} {{ loop.index }} of {{ messages | length }}: {{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
STEPS, TOKENS = 200, 1000


def test_what_is_remembered_is_computed_once_and_what_was_used_longest_ago_is_forgotten() -> None:
    asked: list[str] = []

    def shout(text: str) -> str:
        asked.append(text)
        return text.upper()

    entry = ENTRY_BYTES + 2 * sys.getsizeof("a")
    cache = TextCache(2 * entry)
    memoized = cache.memoize(shout)
    assert [memoized(text) for text in "abab"] == list("ABAB")
    assert (asked, len(cache), cache.bytes) == (["a", "b"], 2, 2 * entry)
    memoized("a")
    memoized("c")  # there is no room for b beside it
    memoized("a")
    assert asked == ["a", "b", "c"]
    memoized("b")
    assert asked == ["a", "b", "c", "b"]
    assert cache.bytes == 2 * entry


def test_two_functions_share_a_bound_but_no_results() -> None:
    cache = TextCache()
    lower, upper = cache.memoize(str.lower), cache.memoize(str.upper)
    assert (lower("Go"), upper("Go"), lower("Go")) == ("go", "GO", "go")
    assert len(cache) == 2


def test_a_result_that_is_larger_than_the_cache_is_returned_and_not_kept() -> None:
    cache = TextCache(1000)
    assert cache.memoize(str.upper)("a" * 5000) == "A" * 5000
    assert (len(cache), cache.bytes) == (0, 0)


def test_sizes_count_what_is_inside() -> None:
    assert size_of("abc") == sys.getsizeof("abc")
    assert size_of((1, 2, 3)) == sys.getsizeof((1, 2, 3)) + 3 * 32
    assert size_of(((1,), "ab")) == sys.getsizeof((0, 0)) + size_of((1,)) + sys.getsizeof("ab")
    reply = ParsedReply("x" * 900, valid=True)
    assert size_of(reply) >= 900 + sys.getsizeof(reply)


@pytest.mark.parametrize("chat", [False, True], ids=["roles", "rewriting"])
def test_two_hundred_steps_of_long_replies_stay_within_the_bound(
    tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    if chat:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = REWRITING
    dialogue = ChatDialogue(tokenizer) if chat else RoleDialogue(tokenizer)
    assert dialogue.cache.limit == CACHED_BYTES == 64 * 2**20
    limit = dialogue.cache.limit = 2 * 2**20  # with fewer replies
    draw, stop = random.Random(0), min(dialogue.stop_ids)
    largest = written = 0
    tracemalloc.start()
    try:
        for step in range(STEPS):
            reply = (*(draw.randrange(10, 320) for _ in range(TOKENS)), stop)
            observation = f"step {step}: " + "a long corridor " * 200
            dialogue.prompt((), observation)
            dialogue.prompt(((observation, reply),), "You see a mug 1.")
            dialogue.parse(reply)
            dialogue.encode_reply(f"take mug {step}")
            written += size_of(reply)
            largest = max(largest, dialogue.cache.bytes)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert written > 3 * limit  # that much a cache of so many entries would hold
    assert limit / 2 < largest <= limit
    assert held < 1.25 * limit  # what Python says is what was counted


def test_an_observation_is_kept_at_its_cut_length(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = RoleDialogue(tokenizer, max_observation_tokens=8)
    sentence = "You see a mug 1, a mug 2 and a desk 1. "
    assert dialogue.prompt((), sentence * 10_000) == dialogue.prompt((), sentence)
    assert dialogue.cache.bytes < 5000  # of 390,000 characters


def test_cutting_a_text_before_it_is_encoded_changes_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(1)
    words = ["mug", "desk", "shelf 1", "  ", "é", "東京", "\n", "zzz", "1,", "You see"]
    for limit in (1, 7, 40):
        dialogue = RoleDialogue(tokenizer, max_observation_tokens=limit)
        for count in (3, 300, 3000):
            text = " ".join(draw.choice(words) for _ in range(count))
            assert dialogue.prompt((), text).ids[1:-1] == dialogue._encode(text)[:limit]


def test_the_tries_of_menus_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRIES, "limit", TRIES.bytes + 200_000)
    draw = random.Random(2)
    for _ in range(300):
        menu = tuple({(*(draw.randrange(50) for _ in range(8)), 99) for _ in range(10)})
        assert token_trie(menu) is token_trie(menu)
        assert TRIES.bytes <= TRIES.limit


@pytest.mark.parametrize(
    ("choices", "tokens", "ids"), [(30, 8, 40), (4, 2, 900), (200, 6, 3), (2, 500, 9999)]
)
def test_a_trie_is_counted_with_all_the_nodes_it_can_come_to(choices: int, tokens: int, ids: int) -> None:
    draw = random.Random(3)
    menu = tuple({(*(draw.randrange(1000, 1000 + ids) for _ in range(tokens)), 1) for _ in range(choices)})
    tracemalloc.start()
    try:
        trie = TokenTrie(menu)
        nodes = [trie.root]
        while nodes:
            node = nodes.pop()
            nodes += [edge.node for edge in node.edges] if node is not None else []
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held <= _trie_bytes(trie)
