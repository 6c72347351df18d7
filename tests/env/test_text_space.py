"""The space of texts takes any text."""

import pickle

import gymnasium
import numpy as np
import pytest

from agentrl.env import TextSpace


@pytest.mark.parametrize("text", ["", " ", "go to shelf 1", "ä 漢字 🎲\n\x00"])
def test_any_text_is_in_the_space_but_not_in_gymnasiums_own(text: str) -> None:
    assert text in TextSpace()
    assert text not in gymnasium.spaces.Text(1_000_000)


@pytest.mark.parametrize("other", [b"bytes", 3, None, ["a"], np.array("a")])
def test_nothing_but_text_is_in_the_space(other: object) -> None:
    assert other not in TextSpace()


def test_the_length_is_limited_both_bounds_included() -> None:
    assert "abc" in TextSpace(3)
    assert "abcd" not in TextSpace(3)
    assert "x" * 1_000_000 in TextSpace()
    assert "x" * 1_000_001 not in TextSpace()


def test_samples_are_in_the_space_reproducible_and_of_many_lengths() -> None:
    for limit in (1, 5, 1_000_000):
        space, again = TextSpace(limit, seed=3), TextSpace(limit, seed=3)
        samples = [space.sample() for _ in range(50)]
        assert all(sample in space for sample in samples)
        assert samples == [again.sample() for _ in range(50)]
        lengths = {len(sample) for sample in samples}
        assert lengths == {0, 1} if limit == 1 else len(lengths) > 3
        assert max(lengths) <= 32


def test_a_mask_fixes_length_and_letters() -> None:
    space = TextSpace(seed=0)
    only_a = np.array([character == "a" for character in space.character_list], dtype=np.int8)
    assert space.sample(mask=(4, only_a)) == "aaaa"


def test_spaces_are_equal_by_length_and_print_it() -> None:
    assert TextSpace(5) == TextSpace(5) != TextSpace(6)
    assert TextSpace(5) != gymnasium.spaces.Text(5)
    assert len({TextSpace(5), TextSpace(5), TextSpace(6)}) == 2
    assert repr(TextSpace(5)) == "TextSpace(max_length=5)"
    assert pickle.loads(pickle.dumps(TextSpace(5))) == TextSpace(5)
