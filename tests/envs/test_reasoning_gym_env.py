"""`agentrl/ReasoningGym-v0`: the datasets of reasoning-gym, with their own scorers."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentrl.env import check_text_env, make, make_panel, verify
from agentrl.errors import ConfigError, MissingDependencyError
from agentrl_envs import limited_calls, reasoning_gym_data
from agentrl_envs.reasoning_gym_data import BY_HASH_SEED, FUNCTIONS, open_dataset
from agentrl_envs.reasoning_gym_env import LARGEST, ReasoningGymEnv

ID = "agentrl/ReasoningGym-v0"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[reasoning-gym\]'"):
        ReasoningGymEnv(size=17)


gym = pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")


@pytest.fixture(scope="module", autouse=True)
def _keep_judges() -> Iterator[None]:
    """Start the scoring process once for all tests, since it takes seconds."""

    class User:
        pass

    user = User()
    limited_calls.calls.join(user)
    limited_calls.calls.call("math", "gcd", 1, 2)
    yield
    limited_calls.calls.leave(user)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataset": "pool_matrix", "text": "short"},
        {"dataset": "graph_color"},
        pytest.param({"dataset": "list_functions"}, marks=slow),
        pytest.param({"dataset": "simple_equations", "level": 2, "partial": True}, marks=slow),
    ],
    ids=str,
)
def test_it_keeps_the_environment_contract(settings: dict[str, Any]) -> None:
    report = check_text_env(partial(make, ID, **settings), tasks=3)
    report.raise_if_failed()
    assert ("expert" in report.declares) is (settings.get("dataset") != "graph_color")


def step(env: ReasoningGymEnv, task: str, reply: str) -> tuple[float, dict[str, Any]]:
    env.reset(options={"task": task})
    _, reward, terminated, truncated, info = env.step(reply)
    assert (terminated, truncated) == (True, False)
    return reward, info


@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "simple_integration", "n_queens"])
def test_the_datasets_own_answer_scores_one(dataset: str) -> None:
    env = ReasoningGymEnv(dataset=dataset, expert=True)
    for index in range(3):
        _, info = env.reset(options={"task": f"test/{index}"})
        _, reward, _, _, info = env.step(info["expert"])
        assert (reward, info["score"], info["success"], info["task_type"]) == (1.0, 1.0, True, dataset)
    env.close()


def test_only_a_score_of_one_is_a_success_and_rewarded() -> None:
    strict, partial_credit = (
        ReasoningGymEnv(dataset="countdown"),
        ReasoningGymEnv(dataset="countdown", partial=True),
    )
    reward, info = step(strict, "train/0", "<answer>1 + 1</answer>")
    assert (reward, info["score"], info["success"]) == (0.0, 0.05, False)
    reward, info = step(partial_credit, "train/0", "<answer>1 + 1</answer>")
    assert (reward, info["score"], info["success"]) == (0.05, 0.05, False)
    strict.close()
    partial_credit.close()


def test_a_scorer_that_fails_on_a_reply_scores_zero() -> None:
    env = ReasoningGymEnv(dataset="prime_factorization")
    with pytest.raises(ValueError, match="banana"):
        env._datasets["train"]._data.score_answer("banana", env._datasets["train"].item(0))
    reward, info = step(env, "train/0", "banana")
    assert (reward, info["score"], info["success"]) == (0.0, 0.0, False)
    env.close()


@pytest.mark.parametrize(
    ("dataset", "reply"),
    [
        ("binary_matrix", "[[10**10**10]]"),
        ("simple_integration", "9**9**9**9"),
    ],
)
def test_replies_that_would_hang_their_scorer_score_zero(
    monkeypatch: pytest.MonkeyPatch, dataset: str, reply: str
) -> None:
    brief = "from agentrl_envs import limited_calls\nlimited_calls.CPU_SECONDS = 1.0\nlimited_calls.serve()"
    monkeypatch.setattr(limited_calls, "_BOOT", limited_calls._BOOT.replace("serve()", brief))
    limited_calls.calls.close()
    env = ReasoningGymEnv(dataset=dataset)
    assert step(env, "train/0", reply)[0] == 0.0
    env.close()
    limited_calls.calls.close()


@pytest.mark.parametrize(
    "dataset",
    ["binary_matrix", "n_queens", "spiral_matrix", "string_insertion", *reasoning_gym_data.EXPRESSIONS],
)
def test_a_reply_is_never_run_as_code(dataset: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    data = open_dataset(dataset, None, "{}", 0, 10)
    for attack in (
        f"open({str(touched)!r}, 'w').write('x')",
        f"__import__('pathlib').Path({str(touched)!r}).touch()",
        f"[open({str(touched)!r}, 'w')]",
        "entry['answer']",
    ):
        assert data.score_reply(attack, 0) == 0.0
    assert not touched.exists()


def test_integrals_must_be_worked_out() -> None:
    data = open_dataset("simple_integration", None, "{}", 0, 10)
    task = data.item(0)["metadata"]
    unsolved = f"Integral({task['integrand']}, {task['variable']})"
    assert data.score(unsolved, data.item(0)) == 1.0  # the scorer itself accepts it
    assert data.score_reply(unsolved, 0) == 0.0
    assert data.score_reply(str(data.solution(0)), 0) == 1.0
    assert "integrate" not in FUNCTIONS


@pytest.mark.parametrize(
    ("dataset", "level", "answer"),
    [
        ("game_of_life_halting", None, "banana"),
        ("coin_flip", None, "0"),
        ("puzzle24", None, "1"),  # any way to make 24 of any numbers
        ("syllogism", 1, "Yes"),
        ("game_of_life", 2, "0,0"),  # nothing survives
    ],
)
def test_datasets_that_one_fixed_answer_solves_are_refused(
    dataset: str, level: int | None, answer: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"{dataset}' is refused: the answer '.*{answer}.*' scores 1.0 on [23]"
    ):
        ReasoningGymEnv(dataset=dataset, level=level)


def test_levels_follow_the_curriculum() -> None:
    def terms(level: int | None) -> int:
        return max(
            ReasoningGymEnv(dataset="chain_sum", level=level)
            .reset(options={"task": f"train/{n}"})[0]
            .count(" + ")
            for n in range(30)
        )

    assert terms(1) < terms(4)
    with pytest.raises(ConfigError, match="level: 99, wanted 1 to"):
        ReasoningGymEnv(level=99)
    with pytest.raises(ConfigError, match="'acre' has no curriculum"):
        ReasoningGymEnv(dataset="acre", level=1)
    with pytest.raises(ConfigError, match=r"knight_swap at level 1: min_nodes must|PYTHONHASHSEED"):
        ReasoningGymEnv(dataset="knight_swap", level=1)


def test_the_configuration_can_be_set_with_and_without_a_level() -> None:
    for level in (None, 1):
        env = ReasoningGymEnv(dataset="chain_sum", level=level, config={"min_terms": 6, "max_terms": 6})
        question = env.reset(options={"task": "train/0"})[0]
        assert question.count(" + ") + question.count(" - ") == 5


def test_train_and_test_have_seeds_that_are_far_apart() -> None:
    env = ReasoningGymEnv(dataset="chain_sum", size=100)
    assert [data.seed for data in env._datasets.values()] == [0, LARGEST]
    asked = {
        split: {env.reset(options={"task": task})[0] for task in env.tasks(split)} for split in env.splits
    }
    assert len(asked["train"]) > 90
    assert not asked["train"] & asked["test"]
    assert ReasoningGymEnv(seed=1).reset(options={"task": "train/0"})[0] not in asked["train"]


@pytest.mark.parametrize("dataset", ["pool_matrix", "codeio", "list_functions", "chain_sum"])
def test_items_do_not_depend_on_the_global_generators_nor_change_them(dataset: str) -> None:
    def items(seed: int) -> str:
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        data = reasoning_gym_data.Dataset(dataset, None, "{}", 5, 20)
        told = repr([data.item(index)["question"] for index in (3, 1, 2, 0)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return told

    assert items(1) == items(2)


SCRIPT = """
import json, sys
from agentrl_envs.reasoning_gym_data import open_dataset
names = json.loads(sys.argv[1])
items = {n: [open_dataset(n, None, "{}", 0, 99).item(i) for i in (0, 7)] for n in names}
print(json.dumps({n: [[item["question"], item["answer"]] for item in pair] for n, pair in items.items()}))
"""


def test_items_are_the_same_in_another_process_but_for_the_datasets_that_are_refused() -> None:
    cheap = [
        name for name in BY_HASH_SEED if name not in ("codeio", "intermediate_integration", "knight_swap")
    ]
    names = json.dumps([*cheap, "chain_sum", "caesar_cipher", "family_relationships", "group_anagrams"])
    told = []
    for seed in ("0", "0", "1"):
        command = [sys.executable, "-c", SCRIPT, names]
        env = os.environ | {"PYTHONHASHSEED": seed}
        told.append(json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout))
    assert told[0] == told[1]
    assert {name for name in told[0] if told[0][name] != told[2][name]} == set(cheap)


@pytest.mark.skipif(not sys.flags.hash_randomization, reason="Python was started with PYTHONHASHSEED=0")
def test_items_that_differ_between_processes_are_refused() -> None:
    for name in BY_HASH_SEED:
        with pytest.raises(ConfigError, match=f"'{name}' has different items .*PYTHONHASHSEED=0"):
            ReasoningGymEnv(dataset=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "chain_sums"}, "dataset 'chain_sums' is unknown; did you mean 'chain_sum'"),
        ({"dataset": "composite"}, "dataset 'composite' is unknown"),
        ({"config": {"min_term": 2}}, "config of the dataset chain_sum 'min_term' is unknown; did you mean"),
        ({"config": {"seed": 2}}, "config of the dataset chain_sum 'seed' is unknown"),
        ({"config": {"min_terms": -2}}, "config of the dataset chain_sum: min_terms must be"),
        ({"config": {"min_terms": "two"}}, "config of the dataset chain_sum: "),
        ({"config": {"min_terms": {1}}}, "config: .*wanted JSON values"),
        ({"split": "valid"}, "split 'valid' is unknown"),
        ({"text": "long"}, "text 'long' is unknown"),
        ({"size": 0}, "size: 0, wanted a whole number from 1"),
        ({"size": LARGEST + 1}, f"size: {LARGEST + 1}"),
        ({"seed": -1}, "seed: -1"),
        ({"level": True}, "level: True"),
        ({"dataset": "graph_color", "expert": True}, "no answers to these problems are known"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGymEnv(**settings)


def test_a_panel_of_it_is_verified_by_the_content_of_its_items() -> None:
    panel = make_panel(ID, "test", 4, {"dataset": "chain_sum"})
    verify(panel)
    assert panel.hashes != make_panel(ID, "test", 4, {"dataset": "chain_sum", "level": 3}).hashes


@slow
def test_every_dataset_opens_or_is_refused_for_a_fixed_answer() -> None:
    from reasoning_gym.factory import DATASETS

    refused = {"coin_flip", "game_of_life_halting", "puzzle24"}
    for name in sorted(DATASETS.keys() - {"composite", *BY_HASH_SEED, *refused}):
        assert ReasoningGymEnv(dataset=name).reset(options={"task": "test/0"})[0]
    for name in refused:
        with pytest.raises(ConfigError, match="is refused: the answer"):
            ReasoningGymEnv(dataset=name)
