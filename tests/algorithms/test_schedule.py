import pytest

from agentrl.schedule import cosine, linear, warmup


def test_warm_up_reaches_the_full_value_at_its_last_step():
    assert [warmup(step, 5) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert warmup(0, 0) == 1.0


def test_cosine_falls_from_one_to_a_tenth_and_stays_there():
    # halfway: .1 + .9 * (1 + cos(pi / 2)) / 2 = .55
    assert [cosine(step, 5) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert cosine(0, 1) == 1.0


def test_linear_goes_from_start_to_end():
    assert [linear(step, 5, 1.0, 0.2) for step in (0, 1, 4, 7)] == pytest.approx([1, 0.8, 0.2, 0.2])
