"""`agentrl/WebShop-v0`: buy what an instruction asks for in a text version of a web shop.

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
from agentrl_envs.webshop.oracle import Plan, click_names, next_action, plan, suggested_queries
from agentrl_envs.webshop.pages import RENDERERS, SEPARATOR, clickable
from agentrl_envs.webshop.reward import MODES, Reward
from agentrl_envs.webshop.session import START, Node, State, act
from agentrl_envs.webshop.shop import Shop, cache_folder, find_source, open_shop, require


@dataclass(frozen=True, slots=True)
class EpisodeState:
    """State of an episode; immutable.

    Attributes:
        page: The open page as text, without the earlier pages and actions.
        earlier: The (page, action) of the latest steps, as many as an observation shows.
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
    """Web shop: search for a product, open it, choose its options and buy it.

    Actions are "search[words]", on any page, and "click[name]" for an element of the page; any other text
    leaves the page unchanged. The original's debugging commands, such as "search[<r>]", have no special
    meaning here. A purchase terminates the episode with a reward from 0 to 1; only 1 is a success. Without a
    purchase the episode is truncated after `max_steps` actions.

    Tasks are goals; their ids are "split/number" with the number in the original's fixed order of goals.

    Args:
        split: The split from which `reset` draws a task when it is given none: "train", "dev" or "test".
        max_steps: The number of actions per episode.
        data: The folder of WebShop's files (`items_shuffle.json` and `items_ins_v2.json`, or both with the
            suffix `_1000`, and `items_human_ins.json`), or their paths under the keys "products",
            "attributes" and "human"; None for generated products.
        products: The number of products: the first ones of a file, or of the generator (default 1000).
        goals: "synthetic", one per instruction and combination of options, or "human", written by people.
        split_rule: "product" holds out one product in ten for test and one for dev, with all their goals;
            "index" is the original's: goals 0 to 499 are test, 500 to 1499 dev, and the same product may be
            in all three. None is "product" for generated products and "index" for files.
        reward: "original", by which some synthetic goals cannot be reached, or "fixed", which compares
            options as human goals do.
        text: "text" joins the texts of a page by [SEP]; "text_rich" puts each on a line and marks what can be
            and was clicked.
        tagger: The noun tagger for titles: "heuristic", the name of a spaCy model, or a `NounTagger`.
        show_attributes: Whether items have a page with their attributes.
        price_seed: The seed of prices within a range and of price limits.
        draw: How `reset` draws a goal when it is given none: "weighted" by the goals' weights, or "original",
            which shifts the weights by one.
        searches: The number of searches, built from the instruction's words, that `info["actions"]` offers
            on the first page.
        num_prev_obs: The number of earlier pages prepended to an observation.
        num_prev_actions: The number of earlier actions prepended to an observation.
        expert: Whether to add `info["expert"]`, the next action of an oracle that knows the product. If no
            offered search finds the product, one more search is offered.
        cache: The folder for search indexes of files; None for one in the user's cache folder.

    `info` holds success, actions, score (the reward so far), valid, task_type (the product's category),
    state_key, task_text at the reset, expert on request, and after a purchase reward_parts under the
    original's names.
    """

    instructions: ClassVar[str] = (
        "You shop in a web shop. Search for a product, look at the results, open a product, choose the "
        "options that the task asks for and buy it; the purchase ends the task and cannot be undone. An "
        "action is search[words], with words of your own, or click[name], with the name of something on the "
        "page."
    )
    action_forms: ClassVar[Mapping[str, str]] = {"search[": "search[words of your own]"}
    action_tools: ClassVar[Sequence[Mapping[str, Any]]] = (
        {
            "name": "search",
            "description": "Search for products. It can be called on any page.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "Words of your own."}},
            },
            "action": "search[{query}]",
        },
        {
            "name": "click",
            "description": "Click something on the page: a product, an option, a button.",
            "parameters": {
                "type": "object",
                "properties": {"element": {"type": "string", "description": "Its name on the page."}},
            },
            "action": "click[{element}]",
        },
    )

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
        where = find_source(data, products, goals == "human")
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
        """Return the task ids of a split, such as "test/17"."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return GoalIds(split, self.shop.splits[split])

    def task_hash(self, task: str) -> str:
        """Hash the goal, the products and the settings of goals, splits and rewards."""
        goal = self._goal(task)
        content = [
            *(goal.product.asin, goal.instruction, goal.attributes, goal.options, goal.limit),
            *(task, self.shop.catalogue.hash, self._rules),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or a drawn one of the split; return its observation and info."""
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
        return page, self._info(self._episode, True) | {"task_text": goal.instruction}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run an action; return observation, reward, terminated, truncated and info."""
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
        longest = max(self._history_lengths)
        earlier = (*before.earlier, (before.page, action))[-longest:] if longest else ()
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
        """Return the oracle's next action from the current state; None after the end of the episode."""
        episode = self._episode
        if episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        if episode.finished:
            return None
        return next_action(
            self.shop, episode.goal, self._planned(episode.goal), episode.state, episode.clicks
        )

    def snapshot(self) -> EpisodeState:
        """Return the current state of the episode."""
        if self._episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._episode

    def restore(self, snapshot: EpisodeState) -> tuple[str, dict[str, Any]]:
        """Return to a snapshot; return its observation and info."""
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
        for name in click_names(episode.clicks):
            yield f"click[{name}]"

    def _key(self, state: State) -> str:
        visited = sorted(state.visited) if self._rich else ()  # only "text_rich" shows what was visited
        content = (state.page, state.keywords, state.number, state.asin, state.options, visited)
        return hashlib.blake2b(repr(content).encode("utf-8", "replace"), digest_size=8).hexdigest()

    def _queries(self, goal: Goal) -> list[str]:
        if self._offered[0] != goal.number:
            self._offered = goal.number, suggested_queries(goal.instruction, self._searches)
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
    """Lazy sequence of goal ids."""

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
