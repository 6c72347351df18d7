"""Properties of the generated catalogue for any size and seed."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import ConfigError
from agentrl_envs.webshop.generate import NAMES, Files, _types, generate, write

MADE = generate()


def options(product: dict[str, Any]) -> dict[str, list[str]]:
    listed = (product["customization_options"] or {}).items()
    return {name: [value["value"] for value in values] for name, values in listed if values is not None}


def test_the_default_has_a_thousand_products_and_more_than_500_goals() -> None:
    assert len(MADE.products) == len({product["asin"] for product in MADE.products}) == 1000
    asked = [entry for entry in MADE.attributes.values() if "instruction" in entry]
    assert len(asked) > 300
    assert sum(map(len, MADE.human.values())) > 1500


def test_entries_have_the_fields_of_the_originals() -> None:
    for product in MADE.products:
        assert set(product) == {
            *("name", "full_description", "small_description", "images", "product_category", "asin"),
            *("average_rating", "customization_options", "category", "query", "page", "pricing"),
        }
        assert len(product["asin"]) == 10
        assert product["product_category"].count(" › ") >= 2
        assert 1 <= product["pricing"].count("$") <= 2
        assert product["small_description"]
    assert set(MADE.attributes) == {product["asin"] for product in MADE.products}
    assert set(MADE.human) <= set(MADE.attributes)


def test_shares_are_about_those_of_the_original_data() -> None:
    made = generate(10_000)
    categories = Counter(product["category"] for product in made.products)
    wanted = {"beauty": 0.238, "electronics": 0.229, "garden": 0.216, "fashion": 0.2, "grocery": 0.117}
    assert {name: count / 10_000 for name, count in categories.items()} == pytest.approx(wanted, abs=0.03)
    offered = Counter(len(options(product)) for product in made.products)
    assert [offered[count] / 10_000 for count in range(4)] == pytest.approx(
        [0.58, 0.25, 0.165, 0.01], abs=0.03
    )
    assert min(offered.values()) > 0
    two = sum(product["pricing"].count("$") == 2 for product in made.products)
    assert two / 10_000 == pytest.approx(0.093, abs=0.02)


def test_goals_ask_for_what_the_product_has() -> None:
    checked = 0
    for product in MADE.products:
        known = MADE.attributes[product["asin"]]
        assert len(set(known["attributes"])) == len(known["attributes"]) >= 3
        assert set(known.get("instruction_attributes", ())) <= set(known["attributes"])
        assert product["query"] in known.get("instruction", product["query"])
        values = {
            value.replace("/", " | ").lower() for values in options(product).values() for value in values
        }
        for one in MADE.human.get(product["asin"], ()):
            assert one["asin"] == product["asin"]
            assert one["instruction_attributes"]
            assert set(one["instruction_attributes"]) <= set(known["attributes"])
            assert set(one["instruction_options"]) <= values
            assert one["instruction"] == one["instruction"].lower()
            for value in one["instruction_options"]:
                assert value in one["instruction"]
            checked += 1
    assert checked > 1500


def test_every_attribute_can_be_read_on_the_pages_of_its_product() -> None:
    for product in MADE.products:
        shown = " ".join(
            [product["name"], product["full_description"], *product["small_description"]]
        ).lower()
        for attribute in MADE.attributes[product["asin"]]["attributes"]:
            assert attribute in shown


def test_most_products_have_a_neighbour_of_the_same_brand_with_other_attributes() -> None:
    kinds: dict[tuple[str, str], list[frozenset[str]]] = {}
    for product in MADE.products:
        key = (product["name"].split()[0].rstrip(","), product["query"])
        kinds.setdefault(key, []).append(frozenset(MADE.attributes[product["asin"]]["attributes"]))
    near = sum(len(found) for found in kinds.values() if len(set(found)) > 1)
    assert near > 700


def test_the_tables_are_whole() -> None:
    types = [kind for kinds in _types().values() for kind in kinds]
    assert len(_types()) == 5
    assert len({kind.query for kind in types}) == len(types) >= 50
    for kind in types:
        assert kind.one.count("*") == 1
        assert len({one.name for one in kind.attributes}) == len(kind.attributes) >= 10
        assert {one.role for one in kind.attributes} == {"is", "with", "for"}
        assert kind.prices[0] < kind.prices[1]
        assert len({option.name for option in kind.options}) == len(kind.options) >= 2
        for option in kind.options:
            assert len({value.lower() for value in option.values}) == len(option.values) >= 3


def test_a_small_catalogue_begins_every_larger_one() -> None:
    large = generate(1300)
    for size in (1, 499, 501):
        small = generate(size)
        assert small.products == large.products[:size]
        assert small.attributes == dict(list(large.attributes.items())[:size])


def test_seeds_give_other_catalogues() -> None:
    assert generate(50, seed=1).products != generate(50, seed=2).products
    assert generate(50, seed=1) == generate(50, seed=1)


def read(folder: Path) -> Files:
    return Files(*(json.loads((folder / name).read_text(encoding="utf-8")) for name in NAMES))


@pytest.mark.parametrize("size", [1, 700])
def test_written_files_hold_what_is_generated(tmp_path: Path, size: int) -> None:
    assert [path.name for path in write(tmp_path / "data", size, 3)] == list(NAMES)
    assert read(tmp_path / "data") == generate(size, 3)


def test_files_are_equal_byte_by_byte_whatever_the_hash_seed(tmp_path: Path) -> None:
    code = "import sys, pathlib, agentrl_envs.webshop.generate as g; g.write(pathlib.Path(sys.argv[1]), 600)"
    hashes = set()
    for seed in ("0", "1", "77"):
        folder = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        hashes.add(hashlib.sha256(b"".join((folder / name).read_bytes() for name in NAMES)).hexdigest())
    assert len(hashes) == 1


@pytest.mark.parametrize(("products", "seed"), [(0, 0), (-1, 0), (1.5, 0), (True, 0), (10, "1"), (10, None)])
def test_bad_sizes_and_seeds_are_refused(tmp_path: Path, products: Any, seed: Any) -> None:
    with pytest.raises(ConfigError, match="wanted a whole number"):
        generate(products, seed)
    with pytest.raises(ConfigError, match="wanted a whole number"):
        write(tmp_path / "none", products, seed)
    assert not (tmp_path / "none").exists()


def test_targets_are_found_with_the_words_of_their_goals() -> None:
    pytest.importorskip("nltk", reason="extra webshop")
    from agentrl_envs.webshop.search import SearchIndex, document

    texts = []
    for product in MADE.products:
        offered = {
            name.lower(): [value.lower() for value in values] for name, values in options(product).items()
        }
        first = product["small_description"][0]
        texts.append(document(product["name"], product["full_description"], first, offered))
    index = SearchIndex.build([product["asin"] for product in MADE.products], texts)
    asked = [(one["instruction"], asin) for asin, found in MADE.human.items() for one in found]
    ranks = [index.search(text).index(asin) if asin in index.search(text) else 50 for text, asin in asked]
    assert sum(rank < 10 for rank in ranks) > 0.85 * len(ranks)
    assert sum(rank < 50 for rank in ranks) > 0.98 * len(ranks)
    assert 0.3 * len(ranks) < sum(rank == 0 for rank in ranks) < 0.8 * len(ranks)  # search is not enough
