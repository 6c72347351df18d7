"""A shop: products, goals and search, shared by all environments of a process with the same settings."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from agentrl.errors import ConfigError, missing_extra
from agentrl_envs.webshop.catalogue import Catalogue, Product, load_catalogue
from agentrl_envs.webshop.goals import Goal, Goals
from agentrl_envs.webshop.nouns import NounTagger
from agentrl_envs.webshop.pages import Content, on_page, page
from agentrl_envs.webshop.reward import Reward, reward
from agentrl_envs.webshop.session import Node, State

GENERATED = 1000  # number of generated products
GENERATOR_SEED = 0
FILES = {"products": "items_shuffle", "attributes": "items_ins_v2"}
HUMAN = "items_human_ins.json"
SHORT = "_1000"  # suffix of the file names of the official small set
ROLES = ("products", "attributes", "human")

_lock = threading.RLock()


class Search(Protocol):
    """Search function over the products."""

    def __call__(self, query: str, /) -> Sequence[str]:
        """Return the asins of the best products for a query, best first."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """Source of the products: three files, or the generator.

    Attributes:
        products: The products file; None for the generator.
        limit: The number of products; None for all, or for the generator's default.
        stamps: The modification time and size of each file, by which a changed file is detected.
    """

    products: Path | None = None
    attributes: Path | None = None
    human: Path | None = None
    limit: int | None = None
    stamps: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the source for labels."""
        return "generated" if self.products is None else self.products.name.removesuffix(".json")


def find_source(data: str | Path | Mapping[str, str | Path] | None, limit: int | None, human: bool) -> Source:
    """Locate the files of the products.

    Args:
        data: The folder with files of the official names, or their paths under the keys "products",
            "attributes" and "human"; None for generated products. A folder's full set precedes its small set.
        limit: The number of products; None for the default.
        human: Whether the file of human instructions is needed.

    Raises:
        ConfigError: A file that is needed is missing; the message names it.
    """
    if data is None:
        return Source(limit=limit)
    if isinstance(data, Mapping):
        wrong = sorted(set(data) - set(ROLES))
        if wrong:
            raise ConfigError(f"data: {wrong[0]!r} is unknown, wanted paths under {', '.join(ROLES)}")
        paths = {role: Path(path) for role, path in data.items()}
    elif Path(data).is_dir():
        paths = _official(Path(data))
    else:
        raise ConfigError(
            f"data: {str(data)!r}, wanted a folder, or the paths of the files as "
            f"{{{', '.join(f'{role}: path' for role in ROLES)}}}"
        )
    needed = ROLES if human else ROLES[:2]
    for role in needed:
        if role not in paths:
            raise ConfigError(f"data: has no path for the {role} file")
        if not paths[role].is_file():
            raise ConfigError(f"data: there is no {role} file {paths[role]}")
    found = {role: paths[role].resolve() for role in needed}
    stats = [path.stat() for path in found.values()]
    stamps = tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
    return Source(**found, limit=limit, stamps=stamps)


def _official(folder: Path) -> dict[str, Path]:
    ends = ("", SHORT)
    end = next((end for end in ends if (folder / f"{FILES['products']}{end}.json").is_file()), "")
    return {role: folder / f"{name}{end}.json" for role, name in FILES.items()} | {"human": folder / HUMAN}


@dataclass(frozen=True, slots=True)
class Shop:
    """A shop; read-only and thread-safe.

    Attributes:
        catalogue: The products.
        goals: The goals.
        splits: Split -> numbers of its goals.
        search: The search function.
        tagger: The noun tagger for titles.
        reward: "original" or "fixed".
        show_attributes: Whether items have a page with their attributes.
    """

    catalogue: Catalogue
    goals: Goals
    splits: Mapping[str, Sequence[int]]
    search: Search
    tagger: NounTagger
    reward: str
    show_attributes: bool

    def page(self, goal: Goal, state: State, score: float = 0.0) -> tuple[Node, ...]:
        """Return the elements of the open page."""
        products: list[str] = []
        found = 0
        if state.page == "results":
            hits = self.search(state.query)
            found, products = len(hits), list(on_page(hits, state.number))
        elif state.asin:
            products = [state.asin]
        shown = tuple(self.catalogue.by_asin[asin] for asin in products)
        content = Content(goal.instruction, shown, found, self.show_attributes, score)
        return page(state, content, str(goal.number))

    def judge(self, goal: Goal, state: State) -> Reward:
        """Return the reward for buying the open item."""
        product, price = self.catalogue.by_asin[state.asin], self.goals.prices[state.asin]
        return reward(product, dict(state.options), price, goal, self.reward, self.tagger)


def open_shop(
    where: Source,
    goals: str,
    price_seed: int,
    split_rule: str,
    tagger: NounTagger,
    mode: str,
    show_attributes: bool,
    cache: Path | None,
) -> Shop:
    """Build a shop, reusing the parts that this process has loaded."""
    with _lock:
        catalogue = _catalogue(where)
        wanted, splits = _goals(catalogue, goals, price_seed, split_rule)
    return Shop(catalogue, wanted, splits, _searcher(catalogue, cache), tagger, mode, show_attributes)


@lru_cache(maxsize=4)
def _catalogue(where: Source) -> Catalogue:
    if where.products is not None and where.attributes is not None:
        return load_catalogue(where.products, where.attributes, where.human, where.limit)
    from agentrl_envs.webshop.generate import generate

    made = generate(products=where.limit or GENERATED, seed=GENERATOR_SEED)
    return Catalogue(made.products, made.attributes.items(), made.human.items())


@lru_cache(maxsize=8)
def _goals(
    catalogue: Catalogue, kind: str, price_seed: int, split_rule: str
) -> tuple[Goals, Mapping[str, Sequence[int]]]:
    goals = Goals(catalogue, kind, price_seed)
    if not goals:
        raise ConfigError(
            f"goals: none of the {len(catalogue)} products has a {kind} instruction with attributes; "
            "check that the files belong to one set"
        )
    return goals, goals.split(split_rule)


@lru_cache(maxsize=8)
def _searcher(catalogue: Catalogue, cache: Path | None) -> Search:
    """Return a search function that opens the index when it is first called; listing tasks needs none."""
    opened: list[Search] = []

    def search(query: str, /) -> Sequence[str]:
        if not opened:
            with _lock:
                if not opened:
                    opened.append(_index(catalogue, cache))
        return opened[0](query)

    return search


def _index(catalogue: Catalogue, cache: Path | None) -> Search:
    from agentrl_envs.webshop.search import document, open_index

    def text(product: Product) -> str:
        first = product.bullets[0] if product.bullets else ""
        return document(product.title, product.description, first, product.options)

    texts = map(text, catalogue.products)
    return open_index(list(catalogue.by_asin), texts, catalogue.sold_hash, cache).search


def cache_folder() -> Path:
    """Return the default folder for the search indexes of files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "agentrl", "webshop")


def require() -> None:
    """Raise `MissingDependencyError` if the extra `webshop` is not installed."""
    missing = [name for name in ("filelock", "nltk", "rapidfuzz", "regex") if find_spec(name) is None]
    if missing:
        raise missing_extra(f"WebShop needs {', '.join(missing)}", "webshop")
