import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agentrl.policy import sampling
from agentrl.policy.sampling import Draws, draw, draw_rows

# With hidden = 1 the logits are the weights themselves: probabilities 1/8, 3/8, 4/8.
WEIGHT = torch.tensor([[1.0], [3.0], [4.0]]).log()
ENTROPY = 1 / 8 * math.log(8) + 3 / 8 * math.log(8 / 3) + 1 / 2 * math.log(2)


def _draw(
    uniforms: list[float],
    menus: list[tuple[int, ...]] | None = None,
    temperature: float = 1.0,
    weight: Tensor = WEIGHT,
) -> Draws:
    rows = len(uniforms)
    return draw(torch.ones(rows, 1), weight, menus, np.array(uniforms), np.full(rows, temperature))


def test_a_draw_is_the_first_id_whose_cumulative_probability_passes_the_uniform() -> None:
    drawn = _draw([0.0, 0.12, 0.13, 0.49, 0.51, 0.999999])
    assert drawn.chosen == [0, 0, 1, 1, 2, 2]
    assert drawn.logprobs == pytest.approx([math.log(p / 8) for p in (1, 1, 3, 3, 4, 4)], abs=1e-6)
    assert drawn.entropies == pytest.approx([ENTROPY] * 6, abs=1e-6)


def test_a_menu_renormalises_over_its_ids() -> None:
    drawn = _draw([0.24, 0.26, 0.1], [(0, 1), (0, 1), (1, 2, 0)])
    assert drawn.chosen == [0, 1, 0]  # places in the menu
    assert drawn.logprobs == pytest.approx([math.log(1 / 4), math.log(3 / 4), math.log(3 / 8)], abs=1e-6)
    two = 1 / 4 * math.log(4) + 3 / 4 * math.log(4 / 3)
    assert drawn.entropies == pytest.approx([two, two, ENTROPY], abs=1e-6)


def test_a_temperature_of_one_half_squares_the_probabilities() -> None:
    drawn = _draw([0.5], temperature=0.5)  # 1 : 9 : 16
    assert drawn.chosen == [2]
    assert drawn.logprobs == pytest.approx([math.log(16 / 26)], abs=1e-6)


def test_at_temperature_0_the_likeliest_is_taken_and_described_at_temperature_1() -> None:
    drawn = _draw([0.0, 0.0], [(0, 1), (2, 0)], temperature=0.0)
    assert drawn.chosen == [1, 0]
    assert drawn.logprobs == pytest.approx([math.log(3 / 4), math.log(4 / 5)], abs=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_an_id_without_weight_is_never_drawn(uniform: float) -> None:
    weight = torch.tensor([[-math.inf], [0.0], [-math.inf]])
    drawn = _draw([uniform], weight=weight)
    assert drawn.chosen == [1]
    assert drawn.entropies == [0.0]


def test_logits_that_are_not_finite_show_in_the_entropy() -> None:
    drawn = _draw([0.5, 0.5], weight=torch.tensor([[0.0], [math.nan], [1.0]]))
    assert all(math.isnan(entropy) for entropy in drawn.entropies)


def test_a_large_head_is_read_only_at_the_menu_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    menus = [(0, 1), (2, 0), (0, 1, 2)]
    expected = _draw([0.3, 0.6, 0.9], menus)
    monkeypatch.setattr(sampling, "SMALL_VOCABULARY", 0)
    assert _draw([0.3, 0.6, 0.9], menus) == expected


def test_rows_drawn_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _draw([0.1, 0.3, 0.6, 0.9, 0.2])
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 6)  # two rows of three
    assert _draw([0.1, 0.3, 0.6, 0.9, 0.2]) == expected


@pytest.mark.parametrize("vocabulary", [1, 511, 512, 513, 3000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_draws_are_those_of_float64_but_for_rounding(vocabulary: int, temperature: float) -> None:
    rows = 2000
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    uniforms, temperatures = np.random.default_rng(0).random(rows), np.full(rows, temperature)
    wanted = sampling._draw_rows(sampling._to_numpy(logits), uniforms, temperatures, 10)
    found = draw_rows(logits.clone(), torch.from_numpy(uniforms), torch.from_numpy(temperatures), 10)
    same = found[0].numpy() == wanted.chosen
    assert same.mean() >= 0.999
    np.testing.assert_allclose(found[2], wanted.entropies, atol=1e-5)
    np.testing.assert_allclose(found[3], wanted.confidences, atol=1e-5)
    np.testing.assert_allclose(found[1][same], np.array(wanted.logprobs)[same], atol=1e-5)
    # Where another id is drawn, the uniform lies on the step between the two.
    scaled = logits.double().numpy() / (temperature or 1.0)
    shares = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    steps = (shares / shares.sum(axis=1, keepdims=True)).cumsum(axis=1)
    for row in np.flatnonzero(~same):
        lower = int(min(found[0][row], wanted.chosen[row]))
        assert abs(steps[row, lower] - uniforms[row]) < 1e-6


def test_the_end_of_the_range_takes_the_last_id_with_weight() -> None:
    logits = torch.full((2, 1200), -torch.inf)
    logits[0, [3, 700]], logits[1, 1100] = 0.0, 5.0
    drawn = draw_rows(logits, torch.tensor([1 - 2**-53] * 2, dtype=torch.float64), torch.ones(2))
    assert drawn[0].tolist() == [700, 1100]
    assert drawn[2].tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
