"""A learner sharded over two processes equals a single-process learner; one spawn serves all tests."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fsdp_worker import CHECKPOINTED, Figures, measured, restore, save, taught

from agentrl.algorithms.recipe import recipe_names
from agentrl.learn.packing import rank_micro_batches
from agentrl.learn.ranks import ALONE, Ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def figures(folder: Path) -> Figures:
    optional = ("adapters",) if find_spec("peft") else ()
    return measured(
        folder,
        *optional,
        "every_recipe",
        "token_statistics",
        "shared_features",
        "off_policy",
        "a_transformer",
        "tempered",
        "distilled",
        "muon",
        "in_float32",
        "recomputed",
        "in_bfloat16",
        "exported",
        "lost_numbers",
        "widened",
        "an_error",
        "saved",
    )


def assert_equal(found: Figures, gradient: float = 1e-6, weights: float = 1e-5) -> None:
    """Compare after five updates of two optimiser steps each."""
    assert found["moved"] > 100 * weights
    assert found["gradient"] < gradient
    assert found["weights"] < weights
    assert found["unequal numbers"] == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_learns_on_two_ranks_what_it_learns_alone(name: str, figures: Figures) -> None:
    assert_equal(figures["every_recipe"][name], gradient=1e-12, weights=1e-12)


def test_two_ranks_compute_the_statistics_that_one_computes(figures: Figures) -> None:
    found = figures["token_statistics"]
    assert found["names"] == ["entropy_change", "sequence_logprob", "sequence_logprob:trajectory", "topk:3"]
    assert found["scores"] < 1e-6  # stored in single precision
    assert found["gradient"] < 1e-12
    assert found["weights"] < 1e-12
    assert found["term"] < 1e-12


def test_two_ranks_learn_from_shared_features_what_one_learns(figures: Figures) -> None:
    assert_equal(figures["shared_features"], gradient=1e-12, weights=1e-12)


@pytest.mark.parametrize("name", ["ppo", "gspo", "spear"])
def test_so_do_those_that_weigh_what_others_drew(name: str, figures: Figures) -> None:
    assert_equal(figures["off_policy"][name], gradient=1e-12, weights=1e-12)


@pytest.mark.parametrize("name", ["grpo", "ppo", "epo", "vogue", "prime"])
def test_so_does_a_transformer(name: str, figures: Figures) -> None:
    assert_equal(figures["a_transformer"][name], gradient=1e-9, weights=1e-9)


def test_so_does_one_whose_layers_are_computed_again_and_whose_rows_come_one_by_one(figures: Figures) -> None:
    assert_equal(figures["recomputed"], gradient=1e-9, weights=1e-9)


@pytest.mark.skipif(not find_spec("peft"), reason="needs the extra lora")
def test_so_do_adapters(figures: Figures) -> None:
    assert_equal(figures["adapters"], gradient=1e-9, weights=1e-9)


def test_so_do_tokens_that_were_sampled_at_different_temperatures(figures: Figures) -> None:
    assert_equal(figures["tempered"], gradient=1e-12, weights=1e-12)


@pytest.mark.parametrize("mode", ["advantage", "loss"])
def test_so_does_one_with_a_teacher(mode: str, figures: Figures) -> None:
    assert_equal(figures["distilled"][mode], gradient=1e-9, weights=1e-9)


def test_so_does_muon(figures: Figures) -> None:
    assert_equal(figures["muon"], gradient=1e-12, weights=1e-9)


def test_single_precision_rounds_two_ranks_as_it_rounds_other_micro_batches(figures: Figures) -> None:
    found = figures["in_float32"]["adamw"]
    assert found["gradient"] < max(1e-6, 4 * found["gradient of one"])
    assert found["weights"] < 1e-5 < 0.01 * found["moved"]


def test_muon_makes_more_of_that_rounding_than_adamw(figures: Figures) -> None:
    """Muon orthogonalises in bfloat16: a gradient's difference in digit 7 becomes one in digit 3."""
    found = figures["in_float32"]["muon"]
    assert found["weights"] < 4 * found["weights of one"]
    assert found["weights"] < 0.1 * found["moved"]


def test_in_bfloat16_weights_and_gradients_stay_in_single_precision(figures: Figures) -> None:
    found = figures["in_bfloat16"]
    assert found["dtypes"] == ["torch.float32"]
    assert 1e-4 < found["gradient"] < 5e-2  # rounded, and close
    assert found["entropy"] < 1e-3


def test_a_number_that_one_rank_lost_stops_all_and_is_named(figures: Figures) -> None:
    found = figures["lost_numbers"]
    assert found["before"] == []
    assert found["after"] == [["model.norm.weight"]] * 2
    assert all("left nan or inf in model.norm.weight" in told for told in found["told"])
    assert len(found["told"]) == 2
    assert found["stored"] == ["learned.policy.model.norm.weight"]


def test_shards_in_bfloat16_are_taken_up_in_single_precision(figures: Figures) -> None:
    found = figures["widened"]
    assert found["apart"] == 0.0
    assert found["dtypes"] == ["torch.float32"]
    assert found["moved"] > 0.9


def test_the_weights_of_the_first_rank_are_those_of_all_and_can_be_copied_out(figures: Figures) -> None:
    assert figures["exported"]["apart"] == 0.0


def test_what_one_rank_raises_all_raise_and_what_is_dealt_comes_back_in_order(figures: Figures) -> None:
    assert figures["an_error"] == {"told": ["the disk of the last rank"] * 2, "dealt": [0, 1, 2, 3, 4]}


def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(figures: Figures, folder: Path) -> None:
    for kind in CHECKPOINTED:
        learner, algorithm = restore(kind, folder / f"{kind}-two", ALONE)
        taught(learner, algorithm, [2])
        save(learner, folder / f"{kind}-one", ALONE)
    dist.destroy_process_group()  # the group of one process that FSDP2 needed
    resumed = measured(folder, "restored")["restored"]
    for kind in CHECKPOINTED:
        torch.testing.assert_close(resumed[kind], figures["saved"][kind], rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [5, 20, 1000])
def test_ranks_share_rows_evenly_and_keep_step(count: int, budget: int) -> None:
    lengths = torch.tensor([9, 0, 4, 4, 7, 2, 0, 1])
    hands = [rank_micro_batches(lengths, budget, Ranks(index, count)) for index in range(count)]
    assert len({len(hand) for hand in hands}) == 1
    real = [int(row) for hand in hands for rows, weight in hand for row in rows if weight]
    assert sorted(real) == [0, 2, 3, 4, 5, 7]
    loads = [sum(int(lengths[rows].sum()) for rows, weight in hand if weight) for hand in hands]
    assert max(loads) == {1: 27, 2: 14, 3: 9, 7: 9}[count]  # of 9 + 7 + 4 + 4 + 2 + 1
    assert all(rows.tolist() == [7] for hand in hands for rows, weight in hand if not weight)


def test_nothing_to_do_is_shared_by_all() -> None:
    assert rank_micro_batches(torch.tensor([0, 0]), 10, Ranks(0, 2)) == []
