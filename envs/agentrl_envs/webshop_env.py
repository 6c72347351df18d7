"""`agentrl/WebShop-v0`: buy what a customer asks for in a web shop, as text.

Pages, search, goals and rewards are WebShop's (Yao et al. 2022, arXiv:2207.01206). Products are generated,
unless `data` names files of the original; a score on generated products is not a score of the benchmark.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.env import TextSpace, unknown
from agentrl.env.numbers import MAX_STEPS, whole_number
from agentrl_envs.webshop.goals import SPLITS, Draw, Goal
from agentrl_envs.webshop.nouns import NounTagger, noun_tagger
from agentrl_envs.webshop.oracle import Plan, advise, plan, playable, queries
from agentrl_envs.webshop.pages import RENDERERS, SEPARATOR, clickable
from agentrl_envs.webshop.reward import MODES, Reward
from agentrl_envs.webshop.session import START, Node, State, act
from agentrl_envs.webshop.shop import Shop, cache_folder, open_shop, require, source


@dataclass(frozen=True, slots=True)
class EpisodeState:
    """A point of an episode to come back to; nothing of it is ever changed.

    Attributes:
        page: the open page as text, without what is put in front of it.
        earlier: (page, action) of the latest steps, as many as are shown.
    """

    task: str
    goal: Goal
    state: State
    nodes: tuple[Node, ...]
    clicks: Mapping[str, Node]
    page: str
    observation: str
    steps: int = 0
    finished: bool = False
    reward: Reward | None = None
    earlier: tuple[tuple[str, str], ...] = ()


class WebShopEnv(gymnasium.Env[str, str]):
    """Search for a product, open it, choose its options and buy it.

    Actions are "search[words]", on any page, and "click[name]" of something on the page; whatever else is
    said leaves the page as it is. The original's commands for its authors, such as "search[<r>]", are words
    like others here. A purchase ends the episode with a reward from 0 to 1; only 1 is a success. Without one
    it is cut off after `max_steps` actions.

    Tasks are goals, called "split/number" by their place in the original's fixed order of goals.

    Args:
        split: "train", "dev" or "test": where `reset` without a task draws from.
        max_steps: actions per episode.
        data: folder of WebShop's files (`items_shuffle.json` and `items_ins_v2.json`, or both ending in
            `_1000`, and `items_human_ins.json`), or their paths under "products", "attributes" and "human";
            None for generated products.
        products: only so many, from the first; of generated ones, how many (1000).
        goals: "synthetic", one per instruction and combination of options, or "human", written by people.
        split_rule: "product" holds out one product in ten for test and one for dev, with all their goals;
            "index" is the original's: goals 0 to 499 are test, 500 to 1499 dev, and the same product may be
            in all three. None is "product" for generated products and "index" for files.
        reward: "original", by which some synthetic goals cannot be reached, or "fixed", which compares
            options as human goals do.
        text: "text" joins what is shown by [SEP]; "text_rich" gives it lines, and marks what was clicked.
        tagger: what finds nouns in titles: "heuristic", the name of a spaCy model, or a `NounTagger`.
        show_attributes: whether items have a page of their attributes.
        price_seed: what prices within a range, and price limits, are drawn from.
        draw: how `reset` without a task draws: "weighted" by the goals' weights, or "original", which
            shifts the weights by one.
        searches: how many searches, made of the instruction's words, `info["actions"]` offers on the first
            page.
        num_prev_obs: how many earlier pages are put in front of an observation.
        num_prev_actions: how many earlier actions are.
        expert: give `info["expert"]`, the next action of an oracle that knows the product. Where no offered
            search finds it, one more is offered.
        cache: folder for search indexes of files; None for one in the user's cache folder.

    `info` holds success, actions, score (the reward so far), valid, task_type (the product's category),
    state_key, expert when asked for, and after a purchase reward_parts, under the original's names.
    """

    splits = SPLITS
    determinism = "episode"
    thread_safe: ClassVar[bool] = True
    callers_arguments: ClassVar[tuple[str, ...]] = ("tagger", "cache")

    def __init__(
        self,
        split: str = "train",
        max_steps: int = 15,
        data: str | Path | Mapping[str, str | Path] | None = None,
        products: int | None = None,
        goals: str = "synthetic",
        split_rule: str | None = None,
        reward: str = "original",
        text: str = "text",
        tagger: str | NounTagger = "heuristic",
        show_attributes: bool = False,
        price_seed: int = 0,
        draw: str = "weighted",
        searches: int = 8,
        num_prev_obs: int = 0,
        num_prev_actions: int = 0,
        expert: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        if split_rule is None:
            split_rule = "product" if data is None else "index"
        for name, value, choices in (
            ("split", split, SPLITS),
            ("goals", goals, ("synthetic", "human")),
            ("split_rule", split_rule, ("index", "product")),
            ("reward", reward, MODES),
            ("text", text, tuple(RENDERERS)),
            ("draw", draw, ("weighted", "original")),
        ):
            if value not in choices:
                raise unknown(name, value, choices)
        for name, number, least in (
            ("max_steps", max_steps, 1),
            ("products", 1 if products is None else products, 1),
            ("price_seed", price_seed, 0),
            ("searches", searches, 0),
            ("num_prev_obs", num_prev_obs, 0),
            ("num_prev_actions", num_prev_actions, 0),
        ):
            whole_number(name, number, least, 2**63 - 1 if name == "price_seed" else MAX_STEPS)
        require()
        where = source(data, products, goals == "human")
        found = noun_tagger(tagger)
        kept = None if data is None else cache_folder() if cache is None else Path(cache)
        self.shop: Shop = open_shop(
            where, goals, price_seed, split_rule, found, reward, show_attributes, kept
        )
        self._rules = {
            "goals": goals,
            "price_seed": price_seed,
            "split_rule": split_rule,
            "reward": reward,
            "tagger": found.name,
            "show_attributes": show_attributes,
        }
        self.data = (
            f"{where.name} {len(self.shop.catalogue)} products {self.shop.catalogue.hash[:8]}, "
            f"{goals} goals, reward {reward}, nouns {found.name}, split {split_rule}, price seed {price_seed}"
        )
        self.split = split
        self.max_steps = max_steps
        self._render = RENDERERS[text]
        self._rich = text == "text_rich"
        self._faithful = draw == "original"
        self._searches = searches
        self._history_lengths = num_prev_obs, num_prev_actions
        self._with_expert = expert
        self._draw: Draw | None = None
        self._offered: tuple[int, list[str]] = (-1, [])
        self._plan: tuple[int, Plan] | None = None
        self._episode: EpisodeState | None = None
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    def tasks(self, split: str) -> Sequence[str]:
        """List the ids of a split, such as "test/17"."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return GoalIds(split, self.shop.splits[split])

    def task_hash(self, task: str) -> str:
        """Hash the goal, the products and the rules of goals, splits and rewards."""
        goal = self._goal(task)
        content = [
            *(goal.product.asin, goal.instruction, goal.attributes, goal.options, goal.limit),
            *(task, self.shop.catalogue.hash, self._rules),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            if self._draw is None:
                self._draw = Draw(self.shop.goals, self.shop.splits[self.split], self._faithful)
            task = f"{self.split}/{self._draw(float(self.np_random.random()))}"
        goal = self._goal(task)
        nodes = self.shop.page(goal, START)
        page = self._render(nodes)
        self._episode = EpisodeState(task, goal, START, nodes, clickable(nodes), page, page)
        return page, self._info(self._episode, True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        before = self._episode
        if before is None or before.finished:
            raise ResetNeeded("the episode is over or has not begun: call reset first")
        state = act(before.state, action, before.clicks)
        bought = state is not None and state.page == "done"
        reward = self.shop.judge(before.goal, state) if state is not None and bought else None
        score = 0.0 if reward is None else reward.total
        if state is None:
            nodes, clicks, page = before.nodes, before.clicks, before.page
        else:
            nodes = self.shop.page(before.goal, state, score)
            clicks, page = clickable(nodes), self._render(nodes)
        earlier = (
            (*before.earlier, (before.page, action))[-max(self._history_lengths) :]
            if any(self._history_lengths)
            else ()
        )
        self._episode = episode = EpisodeState(
            before.task,
            before.goal,
            before.state if state is None else state,
            nodes,
            clicks,
            page,
            self._with_earlier(page, earlier),
            before.steps + 1,
            bought or before.steps + 1 >= self.max_steps,
            reward,
            earlier,
        )
        info = self._info(episode, state is not None)
        return episode.observation, score, bought, episode.finished and not bought, info

    def expert(self) -> str | None:
        """Give the oracle's next action, from wherever this episode is; None after its end."""
        episode = self._episode
        if episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        if episode.finished:
            return None
        return advise(self.shop, episode.goal, self._planned(episode.goal), episode.state, episode.clicks)

    def snapshot(self) -> EpisodeState:
        """Keep this point of the episode."""
        if self._episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._episode

    def restore(self, snapshot: EpisodeState) -> tuple[str, dict[str, Any]]:
        """Go back to a kept point; return its observation and info."""
        self._episode = snapshot
        return snapshot.observation, self._info(snapshot, True)

    def _with_earlier(self, page: str, earlier: Sequence[tuple[str, str]]) -> str:
        pages, actions = self._history_lengths
        shown: list[str] = []
        for back, (old, action) in zip(range(len(earlier), 0, -1), earlier, strict=True):
            shown += [old] * (back <= pages) + [action] * (back <= actions)
        return SEPARATOR.join((*shown, page)) if shown else page

    def _info(self, episode: EpisodeState, valid: bool) -> dict[str, Any]:
        score = 0.0 if episode.reward is None else episode.reward.total
        info: dict[str, Any] = {
            "success": score == 1.0,
            "score": score,
            "actions": list(self._menu(episode)),
            "valid": valid,
            "task_type": episode.goal.product.category,
            "state_key": self._key(episode.state),
        }
        if episode.reward is not None:
            info["reward_parts"] = episode.reward.parts()
        if self._with_expert:
            info["expert"] = self.expert()
        return info

    def _menu(self, episode: EpisodeState) -> Iterator[str]:
        if episode.state.page == "index":
            offered = self._queries(episode.goal)
            if self._with_expert:
                query = self._planned(episode.goal).query
                offered = offered if not query or query in offered else [*offered, query]
            for query in offered:
                yield f"search[{query}]"
        for name in playable(episode.clicks):
            yield f"click[{name}]"

    def _key(self, state: State) -> str:
        visited = sorted(state.visited) if self._rich else ()  # nothing else tells
        content = (state.page, state.keywords, state.number, state.asin, state.options, visited)
        return hashlib.blake2b(repr(content).encode("utf-8", "replace"), digest_size=8).hexdigest()

    def _queries(self, goal: Goal) -> list[str]:
        if self._offered[0] != goal.number:
            self._offered = goal.number, queries(goal.instruction, self._searches)
        return self._offered[1]

    def _planned(self, goal: Goal) -> Plan:
        if self._plan is None or self._plan[0] != goal.number:
            self._plan = goal.number, plan(self.shop, goal, self._queries(goal))
        return self._plan[1]

    def _goal(self, task: object) -> Goal:
        split, _, number = task.partition("/") if isinstance(task, str) else ("", "", "")
        if split in SPLITS and number.isascii() and number.isdigit() and len(number) < 16:
            numbers = self.shop.splits[split]  # in ascending order
            at = bisect_left(numbers, int(number))
            if number == str(int(number)) and at < len(numbers) and numbers[at] == int(number):
                goal: Goal = self.shop.goals[int(number)]
                return goal
        raise unknown("task", task, self.tasks(self.split))


class GoalIds(Sequence[str]):
    """Ids of goals by their numbers, made when asked for."""

    def __init__(self, split: str, numbers: Sequence[int]) -> None:
        self._split, self._numbers = split, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [f"{self._split}/{number}" for number in self._numbers[index]]
        return f"{self._split}/{self._numbers[index]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GoalIds) and (self._split, *self._numbers) == (other._split, *other._numbers)

    __hash__ = None  # type: ignore[assignment]
