"""`agentrl/WebShop-v0` as an environment."""

import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from webshop_products import entry, wants

from agentrl.env import check_text_env
from agentrl.errors import ConfigError, MissingDependencyError

pytest.importorskip("nltk", reason="the extra webshop is not installed")
pytest.importorskip("rapidfuzz", reason="the extra webshop is not installed")

from agentrl_envs.webshop import shop as shops
from agentrl_envs.webshop.session import parse
from agentrl_envs.webshop_env import WebShopEnv

SMALL = 60


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Return a shop with twelve lamps on two pages of results."""
    products = [
        entry(f"B{number:03}", name=f"Table Lamp No {number}", options={"Color": ["Red", "Blue"]})
        for number in range(12)
    ]
    attributes = {each["asin"]: wants("brass") for each in products}
    said = {
        "instruction": "a brass lamp.",
        "instruction_attributes": ["brass"],
        "instruction_options": ["red"],
    }
    for name, content in (
        ("products", products),
        ("attributes", attributes),
        ("human", {each["asin"]: [said] for each in products}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: tmp_path / f"{name}.json" for name in ("products", "attributes", "human")}


def lamps(files: dict[str, Path], **settings: Any) -> WebShopEnv:
    return WebShopEnv(data=files, split_rule="product", cache=files["products"].parent / "cache", **settings)


def follow(env: gymnasium.Env[str, str], task: str) -> tuple[list[str], float]:
    """Play the oracle's actions; return them and the last reward."""
    _, info = env.reset(options={"task": task})
    actions, reward, over = [], 0.0, False
    while not over:
        assert info["expert"] in info["actions"]
        actions.append(info["expert"])
        _, reward, terminated, truncated, info = env.step(actions[-1])
        over = terminated or truncated
    assert info["expert"] is None
    return actions, reward


def test_it_keeps_the_environment_contract() -> None:
    report = check_text_env(partial(WebShopEnv, products=SMALL))
    report.raise_if_failed()
    assert report.determinism == report.proven == "episode"
    assert report.thread_safe
    assert {"snapshot", "expert"} <= set(report.declares)


def test_it_keeps_the_contract_with_files_rich_text_and_earlier_steps(files: dict[str, Path]) -> None:
    settings = {"text": "text_rich", "num_prev_obs": 2, "num_prev_actions": 1, "show_attributes": True}
    check_text_env(partial(lamps, files, **settings), tasks=1).raise_if_failed()
    check_text_env(partial(lamps, files, goals="human"), tasks=1).raise_if_failed()


def test_the_embedded_shop_is_large_enough_and_holds_products_out() -> None:
    env = WebShopEnv()
    shop = env.shop
    assert len(shop.catalogue) >= 1000
    assert len(shop.goals) >= 500
    assert not shop.catalogue.skipped
    counts = {split: len(env.tasks(split)) for split in env.splits}
    assert sum(counts.values()) == len(shop.goals)
    asins = {split: {shop.goals.asin(number) for number in shop.splits[split]} for split in env.splits}
    assert not asins["train"] & asins["test"]
    assert not asins["train"] & asins["dev"]
    assert not asins["dev"] & asins["test"]


@pytest.mark.parametrize("reward", ["original", "fixed"])
def test_the_oracle_reaches_one_wherever_the_product_can_be_bought_so(reward: str) -> None:
    env = WebShopEnv(expert=True, reward=reward)
    tasks = [task for split in env.splits for task in list(env.tasks(split))[:60]]
    solved = 0
    for task in tasks:
        actions, last = follow(env, task)
        solved += last == 1.0
        assert len(actions) <= env.max_steps
    print(f"reward {reward}: {solved} of {len(tasks)} reach 1.0")
    if reward == "fixed":
        assert solved == len(tasks)
    assert solved >= 0.9 * len(tasks)


@pytest.mark.reference
def test_on_the_real_products_the_oracle_fails_only_where_the_reward_does(reference_folder: Path) -> None:
    """Play every tenth goal; by the specification, 458 of 6910 goals cannot be reached."""
    data = reference_folder / "webshop" / "data"
    env, fixed = (
        WebShopEnv(data=data, expert=True, price_seed=7, reward=mode) for mode in ("original", "fixed")
    )
    counts: Counter[str] = Counter()
    for split in env.splits:
        for task in list(env.tasks(split))[::10]:
            counts["fixed"] += follow(fixed, task)[1] == 1.0
            reached = follow(env, task)[1] == 1.0
            goal = env.shop.goals[int(task.split("/")[1])]
            exact = shops.State("item", asin=goal.product.asin, options=goal.options)
            assert reached == (env.shop.judge(goal, exact).total == 1.0), task
            counts["original"] += reached
            counts["goals"] += 1
    print(f"reached 1.0: {dict(counts)}")
    assert counts["goals"] == counts["fixed"] == 691
    assert 0.9 < counts["original"] / counts["goals"] < 0.96


def test_an_episode_by_hand(files: dict[str, Path]) -> None:
    env = lamps(files)
    task = env.tasks("train")[0]
    observation, info = env.reset(options={"task": task})
    goal = env.shop.goals[int(task.split("/")[1])]
    asin, colour = goal.product.asin, goal.options[0][1]
    assert observation == f"WebShop [SEP] Instruction: [SEP] {goal.instruction} [SEP] Search"
    assert (info["success"], info["score"], info["valid"], info["task_type"]) == (False, 0.0, True, "garden")
    assert all(action.startswith("search[") for action in info["actions"])
    observation, reward, terminated, truncated, info = env.step(f"search[{goal.product.title}]")
    assert f"[SEP] {asin} [SEP] {goal.product.title} [SEP] $12.5" in observation
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["actions"][:2] == ["click[back to search]", "click[next >]"]
    env.step(f"click[{asin}]")
    observation, *_ = env.step(f"click[{colour}]")
    observation, reward, terminated, truncated, info = env.step("click[buy now]")
    assert (reward, terminated, truncated, info["actions"]) == (1.0, True, False, [])
    assert (info["success"], info["score"]) == (True, 1.0)
    assert info["reward_parts"]["r_type"] == 1.0
    assert info["reward_parts"]["w_att"] == pytest.approx(1 / 3)
    with pytest.raises(ResetNeeded):
        env.step("click[back to search]")


def test_a_purchase_of_something_else_ends_the_episode_without_success(files: dict[str, Path]) -> None:
    env = lamps(files)
    task = env.tasks("train")[0]
    env.reset(options={"task": task})
    env.step("search[table lamp]")
    _, _, _, _, info = env.step("click[next >]")
    env.step(info["actions"][-1])
    _, reward, terminated, _, info = env.step("click[buy now]")
    assert terminated
    assert not info["success"]
    assert 0.0 < reward == info["score"] < 1.0


def test_what_is_not_understood_leaves_the_page_and_counts_as_a_step(files: dict[str, Path]) -> None:
    env = lamps(files, max_steps=3)
    first, begun = env.reset(seed=0)
    for action in ("hello", "click[buy now]"):
        observation, reward, terminated, truncated, info = env.step(action)
        assert (observation, reward, terminated, truncated) == (first, 0.0, False, False)
        assert not info["valid"]
        assert info["state_key"] == begun["state_key"]
    assert env.step("click[search]")[3] is True
    with pytest.raises(ResetNeeded):
        env.step("search[lamp]")
    with pytest.raises(ResetNeeded):
        lamps(files).step("search[lamp]")


def test_earlier_pages_and_actions_are_put_in_front(files: dict[str, Path]) -> None:
    env = lamps(files, num_prev_obs=1, num_prev_actions=2)
    pages = [env.reset(seed=0)[0]]
    plain = lamps(files)
    plain.reset(seed=0)
    actions = ["search[lamp]", "nothing", "click[next >]"]
    seen = []
    for action in actions:
        seen.append(env.step(action)[0])
        pages.append(plain.step(action)[0])
    assert seen[0] == " [SEP] ".join((pages[0], actions[0], pages[1]))
    assert seen[1] == " [SEP] ".join((actions[0], pages[1], actions[1], pages[2]))
    assert seen[2] == " [SEP] ".join((actions[1], pages[2], actions[2], pages[3]))
    assert env.reset(seed=0)[0] == pages[0]


def test_a_snapshot_is_a_place_to_come_back_to(files: dict[str, Path]) -> None:
    env = lamps(files, num_prev_obs=1)
    env.reset(seed=1)
    env.step("search[lamp]")
    kept = env.snapshot()
    page, _, _, _, info = env.step("click[next >]")
    again, restored = lamps(files, num_prev_obs=1).restore(kept)
    assert again == kept.observation
    assert env.restore(kept)[0] == again
    assert env.step("click[next >]")[0] == page
    assert restored["state_key"] != info["state_key"]
    with pytest.raises(ResetNeeded):
        lamps(files).snapshot()


def test_equal_states_have_equal_keys(files: dict[str, Path]) -> None:
    env = lamps(files)
    _, start = env.reset(seed=0)
    keys = [start["state_key"]]
    for action in (
        "search[lamp]",
        "click[b001]",
        "click[features]",
        "click[< prev]",
        "click[red]",
        "click[< prev]",
    ):
        keys.append(env.step(action)[4]["state_key"])
    assert keys[1] == keys[6]
    assert keys[2] == keys[4]
    assert len(set(keys)) == 5
    rich = lamps(files, text="text_rich")
    rich.reset(seed=0)
    shown = [rich.step(action)[4]["state_key"] for action in ("search[lamp]", "click[b001]", "click[< prev]")]
    assert shown[0] != shown[2]  # the second page shows the item as visited


def test_offered_actions_are_the_searches_then_the_clicks(files: dict[str, Path]) -> None:
    env = lamps(files, searches=3)
    draw = Random(0)
    tried = 0
    for task in env.tasks("train"):
        _, info = env.reset(options={"task": task})
        assert len(info["actions"]) == 3
        over = False
        while not over:
            action = draw.choice(info["actions"])
            assert parse(action) is not None
            _, _, terminated, truncated, info = env.step(action)
            assert info["valid"], action
            over, tried = terminated or truncated, tried + 1
    assert tried > 50
    assert lamps(files, searches=0).reset(seed=0)[1]["actions"] == []
    assert "expert" not in info


def test_the_oracle_finds_back_from_wherever_it_is(files: dict[str, Path]) -> None:
    env = lamps(files, expert=True, max_steps=40)
    draw = Random(1)
    solved = 0
    for task in (*env.tasks("train"), *env.tasks("test")):
        _, info = env.reset(options={"task": task})
        for _ in range(10):
            wandering = [action for action in info["actions"] if action != "click[buy now]"]
            *_, info = env.step(draw.choice([*wandering, "search[search_results item_page]"]))
        over, reward = False, 0.0
        while not over:
            _, reward, terminated, truncated, info = env.step(info["expert"])
            over = terminated or truncated
        solved += reward == 1.0
    assert solved == len(env.tasks("train")) + len(env.tasks("test"))


def test_tasks_are_numbers_of_goals_and_others_are_refused(files: dict[str, Path]) -> None:
    env = lamps(files)
    tasks = {split: list(env.tasks(split)) for split in env.splits}
    assert sum(map(len, tasks.values())) == 24
    assert env.tasks("test")[:2] == tasks["test"][:2]
    assert tasks["test"][0] in env.tasks("test")
    elsewhere = tasks["test"][0].replace("test", "train")
    for wrong in (elsewhere, "train/24", "train/-1", "train/00", "train", "", "train/1/2", "train/١", 3):
        with pytest.raises(ConfigError, match="unknown"):
            env.reset(options={"task": wrong})
    for call in (lambda: env.tasks("valid"), lambda: env.task_hash("valid/1")):
        with pytest.raises(ConfigError, match="unknown"):
            call()


def test_the_hash_covers_whatever_changes_a_task_or_its_score(files: dict[str, Path]) -> None:
    def hash_of(**settings: Any) -> str:
        env = lamps(files, **settings)
        return env.task_hash(env.tasks("train")[0])

    plain = hash_of()
    assert plain == hash_of(text="text_rich", max_steps=3, expert=True)
    others = [
        hash_of(reward="fixed"),
        hash_of(price_seed=1),
        hash_of(goals="human"),
        hash_of(show_attributes=True),
    ]
    files["products"].write_text(files["products"].read_text().replace("A lamp.", "No lamp."))
    others.append(hash_of())
    assert len({plain, *others}) == 6
    assert all(len(each) == 64 for each in others)


def test_the_label_says_what_a_score_was_made_with(files: dict[str, Path]) -> None:
    label = lamps(files, reward="fixed", goals="human", price_seed=3).data
    for part in ("products 12 products ", "human goals", "reward fixed", "nouns heuristic", "split product"):
        assert part in label
    assert "price seed 3" in label
    assert WebShopEnv(products=SMALL).data.startswith(f"generated {SMALL} products ")


def test_draws_follow_the_weights_or_the_original(files: dict[str, Path]) -> None:
    def drawn(**settings: Any) -> set[str]:
        env = lamps(files, **settings)
        return {env.snapshot().task for seed in range(300) if env.reset(seed=seed)}

    assert drawn() == set(lamps(files).tasks("train"))
    assert drawn(draw="original") == set(lamps(files).tasks("train")[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, "split 'valid' is unknown"),
        ({"reward": "origin"}, "did you mean 'original'"),
        ({"text": "html"}, "text 'html' is unknown"),
        ({"goals": "both"}, "goals 'both' is unknown"),
        ({"split_rule": "asin"}, "split_rule 'asin' is unknown"),
        ({"draw": "uniform"}, "draw 'uniform' is unknown"),
        ({"max_steps": 0}, "max_steps: 0, wanted a whole number of at least 1"),
        ({"max_steps": True}, "max_steps: True"),
        ({"products": 0}, "products: 0"),
        ({"searches": -1}, "searches: -1"),
        ({"num_prev_obs": 1.5}, "num_prev_obs: 1.5"),
        ({"price_seed": "7"}, "price_seed: '7'"),
        ({"data": "/no/such/folder"}, "data: '/no/such/folder', wanted a folder"),
        ({"tagger": 3}, "tagger: 3"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WebShopEnv(**{"products": SMALL, **settings})


def test_few_goals_cannot_be_split_by_index(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="'index' leaves no training goals: there are 24"):
        WebShopEnv(data=files)


def test_products_that_nobody_wants_make_no_tasks(files: dict[str, Path]) -> None:
    files["attributes"].write_text(json.dumps({"B999": wants("brass")}))
    with pytest.raises(ConfigError, match=r"none of the 12 products has a synthetic instruction.*one set"):
        lamps(files)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shops, "find_spec", lambda name: None if name == "rapidfuzz" else object())
    with pytest.raises(MissingDependencyError, match=r"rapidfuzz: pip install -e '\.\[webshop\]'"):
        WebShopEnv()


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, agentrl_envs.webshop_env; "
        "print([name for name in ('nltk', 'rapidfuzz', 'regex') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_that_begin_at_once_share_one_catalogue_and_one_index(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, built = [], []
    load, build = shops.load_catalogue, shops._index
    monkeypatch.setattr(shops, "load_catalogue", lambda *paths: loaded.append(1) or load(*paths))
    monkeypatch.setattr(shops, "_index", lambda *index: built.append(1) or build(*index))
    start = threading.Barrier(4)

    def play(_: int) -> tuple[str, int]:
        start.wait()
        env = lamps(files)
        env.reset(seed=0)
        return env.step("search[table lamp]")[0], id(env.shop.catalogue)

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(play, range(4)))
    assert len(answers) == len(loaded) == len(built) == 1
