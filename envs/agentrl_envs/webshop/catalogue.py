"""The products of a shop, read from WebShop's three files.

- products (`items_shuffle.json`): the list of products;
- attributes (`items_ins_v2.json`): {asin: attributes and a synthetic instruction};
- human (`items_human_ins.json`): {asin: list of instructions written by people}.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any

from agentrl.errors import ConfigError
from agentrl_envs.webshop.json_entries import entries

NO_PRICE = 100.0
NO_ATTRIBUTES = ("DUMMY_ATTR",)
ASIN_LENGTH = 10
TEXTS = ("name", "full_description", "category", "query", "product_category")
_ASKED = ("attributes", "instruction", "instruction_attributes")
WANTED = {
    "products": "a list of products",
    "attributes": "an object {asin: {attributes, instruction}}",
    "human": "an object {asin: [{instruction, instruction_attributes, instruction_options}]}",
}


@dataclass(frozen=True, slots=True)
class Product:
    """One product.

    Attributes:
        asin: The id of the product.
        bullets: The list under "Features".
        pricing: One price, or the two ends of a range, in dollars.
        price_tag: The price or prices as shown.
        query: The search query under which the original's crawler found it.
        product_category: The categories from general to special, separated by " › ".
        options: Name -> values to choose from.
        attributes: The attributes, such as "long lasting".
        instruction: The synthetic instruction, without price and options; None if no goal is about it.
        instruction_attributes: The attributes that the instruction asks for.
        image: The URL of its picture; "" for none.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    pricing: tuple[float, ...]
    price_tag: str
    category: str
    query: str
    product_category: str
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...] = NO_ATTRIBUTES
    instruction: str | None = None
    instruction_attributes: tuple[str, ...] = ()
    image: str = ""


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction by a person, with the product's attributes and option values that it asks for."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]


class SkippedError(Exception):
    """A product is unusable; the message names the field."""


class Catalogue:
    """Products in the order of their file; read-only.

    Args:
        products: The decoded entries of the products file.
        attributes: Pairs of an asin and its entry of the attributes file.
        human: Pairs of an asin and its entry of the file of human instructions.
        names: The names of the three files in error messages.

    Attributes:
        products: The usable products.
        by_asin: The usable products by asin.
        human: The human instructions by asin; empty if that file was not read.
        skipped: Reason -> number of products or instructions that were skipped for it.

    Raises:
        ConfigError: No product is usable, or an entry does not have the format of its file.
    """

    def __init__(
        self,
        products: Iterable[Any],
        attributes: Iterable[tuple[str, Any]],
        human: Iterable[tuple[str, Any]] = (),
        names: tuple[str, str, str] = ("products", "attributes", "human"),
    ) -> None:
        skipped: Counter[str] = Counter()
        pool: dict[Any, Any] = {}
        sold: dict[str, dict[str, Any]] = {}
        for entry in products:
            if not isinstance(entry, Mapping):
                raise ConfigError(f"{names[0]}: contains {_shown(entry)}, wanted products with asin and name")
            try:
                fields = _fields(entry, sold, pool)
            except SkippedError as reason:
                skipped[str(reason)] += 1
            else:
                sold[fields["asin"]] = fields
        if not sold:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(5))
            raise ConfigError(f"{names[0]}: no product is usable: {reasons or 'there is none'}")
        for asin, entry in attributes:
            if asin in sold:
                sold[asin].update(_attributes(entry, f"{names[1]}: {asin}", pool))
        self.products = tuple(Product(**fields) for fields in sold.values())
        self.by_asin = {product.asin: product for product in self.products}
        self.human: dict[str, tuple[Instruction, ...]] = {}
        for asin, entry in human:
            found = _instructions(entry, f"{names[2]}: {asin}", pool)
            if asin in self.by_asin:
                self.human[asin] = found
            else:
                skipped["human instruction for an absent product"] += len(found)
        self.skipped: Mapping[str, int] = dict(skipped)

    def __len__(self) -> int:
        return len(self.products)

    @cached_property
    def hash(self) -> str:
        """Return the SHA-256, as 64 hex digits, of all loaded content; the files' formatting is ignored."""

        def asked() -> Iterator[Any]:
            yield self.sold_hash
            for product in self.products:
                people = [[one.text, one.attributes, one.options] for one in self.human.get(product.asin, ())]
                yield [*(getattr(product, name) for name in _ASKED), people]

        return _sha256(asked())

    @cached_property
    def sold_hash(self) -> str:
        """Return the SHA-256 of the products file's content, which is all that a search index depends on."""
        sold = [name for name in Product.__slots__ if name not in _ASKED]
        return _sha256([getattr(product, name) for name in sold] for product in self.products)


def load_catalogue(
    products: Path, attributes: Path, human: Path | None = None, limit: int | None = None
) -> Catalogue:
    """Read WebShop's files entry by entry, without holding unused entries in memory.

    Args:
        products: The products file, such as `items_shuffle.json`.
        attributes: The attributes file, such as `items_ins_v2.json`.
        human: The file of human instructions, such as `items_human_ins.json`; None to read none.
        limit: The number of products to read, from the first; None for all.

    Raises:
        ConfigError: A file is missing, truncated or of the wrong kind; the message names it.
    """

    def opened(path: Path, what: str) -> Iterable[tuple[str, Any]]:
        kind, found = entries(path, f"{what} file")
        wanted = "list" if what == "products" else "object"
        for key, value in found:
            other = _mistaken_file(kind, value, what)
            if kind != wanted or other is not None:
                looks = f"; it looks like the {other} file" if other else ""
                raise ConfigError(f"{what} file {path}: wanted {WANTED[what]}, found {_shown(value)}{looks}")
            yield key, value
            break
        else:
            raise ConfigError(f"{what} file {path}: is empty, wanted {WANTED[what]}")
        yield from found

    def sold() -> Iterable[Any]:
        for number, (_, value) in enumerate(opened(products, "products")):
            if number == limit:
                return
            yield value

    return Catalogue(
        sold(),
        opened(attributes, "attributes"),
        () if human is None else opened(human, "human"),
        (f"products file {products}", f"attributes file {attributes}", f"human file {human}"),
    )


def _mistaken_file(kind: str, value: Any, what: str) -> str | None:
    """Return which other file the first entry is from, None if the file is the expected one."""
    if kind == "list":
        found = "products" if isinstance(value, Mapping) and "asin" in value else None
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        found = "human"
    else:
        found = "attributes" if isinstance(value, Mapping) and "attributes" in value else None
    return None if found == what else found


def _fields(entry: Mapping[str, Any], seen: Mapping[str, Any], pool: dict[Any, Any]) -> dict[str, Any]:
    asin = entry.get("asin")
    if not isinstance(asin, str) or asin == "nan" or not 0 < len(asin) <= ASIN_LENGTH:
        raise SkippedError("asin: missing, 'nan' or too long")
    if asin in seen:
        raise SkippedError("asin: listed before")
    for name in TEXTS:
        if not isinstance(entry.get(name), str):
            raise SkippedError(f"{name}: missing or not a string")
    bullets: Any = entry.get("small_description")
    if isinstance(bullets, str):
        bullets = [bullets]
    if not _texts(bullets):
        raise SkippedError("small_description: missing, or neither a string nor a list of strings")
    pricing, price_tag = _pricing(entry.get("pricing"))
    images: Any = entry.get("images")
    return {
        "asin": asin,
        "title": entry["name"],
        "description": entry["full_description"],
        "bullets": tuple(bullets or ()),
        "pricing": pricing,
        "price_tag": price_tag,
        "category": _intern(entry["category"], pool),
        "query": _intern(entry["query"].lower().strip(), pool),
        "product_category": _intern(entry["product_category"], pool),
        "options": _options(entry.get("customization_options"), pool),
        "image": images[0] if _texts(images) and images else "",
    }


def _pricing(text: Any) -> tuple[tuple[float, ...], str]:
    if not text:
        return (NO_PRICE,), f"${NO_PRICE}"
    try:
        prices = tuple(float(Decimal(re.sub(r"[^\d.]", "", part))) for part in text.split("$")[1:])
    except (AttributeError, InvalidOperation) as error:
        raise SkippedError("pricing: no price can be read from it") from error
    if not prices:
        raise SkippedError("pricing: no price can be read from it")
    return prices[:2], " to ".join(f"${price}" for price in prices[:2])


def _options(options: Any, pool: dict[Any, Any]) -> dict[str, tuple[str, ...]]:
    if not options:
        return {}
    try:
        return {
            _intern(name.lower(), pool): _intern(
                tuple(_intern(value["value"].strip().replace("/", " | ").lower(), pool) for value in values),
                pool,
            )
            for name, values in options.items()
            if values is not None
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise SkippedError("customization_options: wanted {name: [{value}]}") from error


def _attributes(entry: Any, where: str, pool: dict[Any, Any]) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: {_shown(entry)}, wanted an object with attributes")
    attributes = entry.get("attributes", list(NO_ATTRIBUTES))
    instruction, wanted = entry.get("instruction"), entry.get("instruction_attributes")
    for field, value, right in (
        ("attributes", attributes, _texts(attributes)),
        ("instruction", instruction, instruction is None or isinstance(instruction, str)),
        ("instruction_attributes", wanted, wanted is None or _texts(wanted)),
    ):
        if not right:
            raise ConfigError(f"{where}: {field} is {_shown(value)}, wanted {_wanted(field)}")
    return {
        "attributes": _intern(tuple(_intern(one, pool) for one in attributes), pool),
        "instruction": instruction,
        "instruction_attributes": _intern(tuple(_intern(one, pool) for one in wanted or ()), pool),
    }


def _instructions(entry: Any, where: str, pool: dict[Any, Any]) -> tuple[Instruction, ...]:
    if not isinstance(entry, list):
        raise ConfigError(f"{where}: {_shown(entry)}, wanted a list of instructions")
    found = []
    for one in entry:
        if not isinstance(one, Mapping):
            raise ConfigError(f"{where}: contains {_shown(one)}, wanted instructions")
        for field in ("instruction", "instruction_attributes", "instruction_options"):
            value = one.get(field)
            if not (isinstance(value, str) if field == "instruction" else _texts(value)):
                raise ConfigError(f"{where}: {field} is {_shown(value)}, wanted {_wanted(field)}")
        attributes = tuple(_intern(text, pool) for text in one["instruction_attributes"])
        found.append(Instruction(one["instruction"], attributes, tuple(one["instruction_options"])))
    return tuple(found)


def _wanted(field: str) -> str:
    return "a string" if field == "instruction" else "a list of strings"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _intern(value: Any, pool: dict[Any, Any]) -> Any:
    """Return the pooled equal of a value, which saves memory: products share most of their values."""
    return pool.setdefault(value, value)


def _sha256(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
