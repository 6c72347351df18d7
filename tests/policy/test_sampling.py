import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agentrl.policy import sampling
from agentrl.policy.sampling import Draws, draw

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
