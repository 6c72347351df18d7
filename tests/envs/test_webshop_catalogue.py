"""WebShop's three files: what is read, what is skipped, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from webshop_products import catalogue, entry, wants

from agentrl.errors import ConfigError
from agentrl_envs.webshop import json_entries
from agentrl_envs.webshop.catalogue import Catalogue, load_catalogue
from agentrl_envs.webshop.shop import find_source

HUMAN = {"instruction": "a lamp.", "instruction_attributes": ["brass"], "instruction_options": ["red"]}


def write(folder: Path, **files: Any) -> dict[str, Path]:
    paths = {}
    for name, content in files.items():
        paths[name] = folder / f"{name}.json"
        text = content if isinstance(content, str) else json.dumps(content)
        paths[name].write_text(text, encoding="utf-8")
    return paths


@pytest.mark.parametrize(
    ("pricing", "prices", "tag"),
    [
        ("$34", (34.0,), "$34.0"),
        ("$1,299.50", (1299.5,), "$1299.5"),
        ("$19.99 - $27.99", (19.99, 27.99), "$19.99 to $27.99"),
        ("from $3 to $2 or $1", (3.0, 2.0), "$3.0 to $2.0"),
        ("", (100.0,), "$100.0"),
        (None, (100.0,), "$100.0"),
    ],
)
def test_prices_are_read_from_their_text(pricing: str | None, prices: tuple[float, ...], tag: str) -> None:
    (product,) = catalogue([entry(pricing=pricing)]).products
    assert (product.pricing, product.price_tag) == (prices, tag)


def test_names_and_values_of_options_are_made_plain() -> None:
    options = {"Color ": [" Red/Blue ", "RED"], "Fit": None, "color ": ["x"], "Size": []}
    (product,) = catalogue([entry(options=options)]).products
    assert product.options == {"color ": ("x",), "size": ()}
    (product,) = catalogue([entry(options={"Color": [" Red/Blue ", "RED"]})]).products
    assert product.options == {"color": ("red | blue", "red")}
    for empty in ("", None, {}):
        assert catalogue([entry(customization_options=empty)]).products[0].options == {}


def test_one_bullet_may_be_a_text_and_queries_are_made_plain() -> None:
    (product,) = catalogue([entry(small_description="one")]).products
    assert product.bullets == ("one",)
    assert product.query == "table lamps"


def test_the_hash_of_what_is_searched_leaves_out_what_is_asked() -> None:
    plain = catalogue([entry()])
    asked = catalogue([entry()], {"B0LAMP": wants("other")}, {"B0LAMP": [HUMAN]})
    assert plain.sold_hash == asked.sold_hash != plain.hash
    assert plain.sold_hash != catalogue([entry(options={"a": ["b"]})]).sold_hash


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"asin": "nan"}, "asin"),
        ({"asin": "B0123456789"}, "asin"),
        ({"asin": None}, "asin"),
        ({"asin": ["B0"]}, "asin"),
        ({"name": None}, "name"),
        ({"full_description": 3}, "full_description"),
        ({"small_description": None}, "small_description"),
        ({"small_description": [None]}, "small_description"),
        ({"category": None}, "category"),
        ({"query": {}}, "query"),
        ({"product_category": []}, "product_category"),
        ({"pricing": "cheap"}, "pricing"),
        ({"pricing": "$"}, "pricing"),
        ({"pricing": "$1.2.3"}, "pricing"),
        ({"pricing": 5}, "pricing"),
        ({"customization_options": ["red"]}, "customization_options"),
        ({"customization_options": {"color": [{"name": "red"}]}}, "customization_options"),
        ({"customization_options": {"color": [{"value": None}]}}, "customization_options"),
    ],
)
def test_a_product_without_a_needed_field_is_skipped_and_counted(fields: dict[str, Any], reason: str) -> None:
    found = Catalogue([entry(), entry("B0BAD") | fields], [])
    assert list(found.by_asin) == ["B0LAMP"]
    ((told, count),) = found.skipped.items()
    assert told.startswith(f"{reason}: ")
    assert count == 1


def test_a_product_that_is_listed_twice_counts_once() -> None:
    found = catalogue([entry(name="first"), entry(name="second")])
    assert [product.title for product in found.products] == ["first"]
    assert found.skipped == {"asin: listed before": 1}


def test_a_product_without_attributes_has_the_originals_stand_in_and_no_goal() -> None:
    products = [entry(asin) for asin in ("B0A", "B0B", "B0C")]
    found = catalogue(products, {"B0A": wants("brass"), "B0B": {"instruction": None}})
    assert [product.attributes for product in found.products] == [
        ("brass",),
        ("DUMMY_ATTR",),
        ("DUMMY_ATTR",),
    ]
    assert [product.instruction for product in found.products] == ["Find me table lamps", None, None]


def test_instructions_for_absent_products_are_left_out_and_counted() -> None:
    found = catalogue([entry()], human={"B0LAMP": [HUMAN], "B0GONE": [HUMAN, HUMAN]})
    assert list(found.human) == ["B0LAMP"]
    assert found.skipped == {"human instruction for an absent product": 2}


def test_when_nothing_can_be_sold_the_message_says_why() -> None:
    with pytest.raises(ConfigError, match=r"products: no product is usable: name: missing.*\(2\)"):
        catalogue([entry("B0A", name=None), entry("B0B", name=None)])


def test_the_hash_covers_what_is_kept_and_nothing_else() -> None:
    plain = catalogue([entry()]).hash
    assert plain == catalogue([entry(brand="x", page=3)]).hash
    others = [
        catalogue([entry(name="x")]),
        catalogue([entry(options={"a": ["b"]})]),
        catalogue([entry()], {"B0LAMP": wants("other")}),
        catalogue([entry()], human={"B0LAMP": [HUMAN]}),
        catalogue([entry(), entry("B0B")]),
    ]
    assert len({plain, *(other.hash for other in others)}) == len(others) + 1


def test_files_give_what_their_content_gives(tmp_path: Path) -> None:
    products = [entry("B0A", name="ü 漢"), entry("B0B", options={"Color": ["Red"]}), entry("B0C")]
    attributes = {each["asin"]: wants("brass") for each in products}
    human = {"B0A": [HUMAN]}
    paths = write(tmp_path, products=products, attributes=attributes, human=human)
    found = load_catalogue(paths["products"], paths["attributes"], paths["human"])
    assert found.products == catalogue(products, attributes, human).products
    assert found.hash == catalogue(products, attributes, human).hash
    assert found.human == catalogue(products, attributes, human).human
    first = load_catalogue(paths["products"], paths["attributes"], limit=2)
    assert list(first.by_asin) == ["B0A", "B0B"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_entries_do_not_depend_on_how_a_file_is_read(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_entries, "CHUNK", chunk)
    values = [1, 12.5, 'a " [ { \\', None, [1, [2]], {"x": {"y": []}}, "ü漢😀", True, -3e5]
    spellings = (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False))
    paths = write(
        tmp_path, a=spellings[0], b=spellings[1], c=json.dumps(dict(zip("abcdefghi", values, strict=True)))
    )
    for name in ("a", "b"):
        kind, found = json_entries.entries(paths[name], "file")
        assert (kind, [value for _, value in found]) == ("list", values)
    kind, found = json_entries.entries(paths["c"], "file")
    assert (kind, list(found)) == ("object", list(zip("abcdefghi", values, strict=True)))
    for text, kind in (("[]", "list"), (" { } ", "object")):
        (path,) = write(tmp_path, empty=text).values()
        assert json_entries.entries(path, "file")[0] == kind
        assert list(json_entries.entries(path, "file")[1]) == []


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    text = json.dumps([{"asin": "B0", "x": [1, "two"]}, {"asin": "B1"}])
    refused = 0
    for end in range(len(text)):
        (path,) = write(tmp_path, cut=text[:end]).values()
        with pytest.raises(ConfigError, match=r"products file .*cut\.json: (truncated|is empty)"):
            list(json_entries.entries(path, "products file")[1])
        refused += 1
    assert refused == len(text)


@pytest.mark.parametrize("text", ["x", "[1,]", "[1 2]", '{"a" 1}', "{1: 2}", "[nope]", '"text"', "12", "[,]"])
def test_what_is_no_json_list_or_object_is_refused(text: str, tmp_path: Path) -> None:
    (path,) = write(tmp_path, bad=text).values()
    with pytest.raises(ConfigError, match=r"products file .*bad\.json"):
        list(json_entries.entries(path, "products file")[1])


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes('[{"asin": "ü"}]'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(json_entries.entries(path, "products file")[1])


@pytest.mark.parametrize(
    ("put", "place", "message"),
    [
        (
            "attributes",
            "products",
            "products file .*: wanted a list of products.*looks like the attributes file",
        ),
        ("human", "products", "products file .*looks like the human file"),
        ("products", "attributes", "attributes file .*looks like the products file"),
        ("human", "attributes", "attributes file .*looks like the human file"),
        ("products", "human", "human file .*looks like the products file"),
        ("attributes", "human", "human file .*looks like the attributes file"),
    ],
)
def test_mixed_up_files_are_recognised(put: str, place: str, message: str, tmp_path: Path) -> None:
    paths = write(
        tmp_path, products=[entry()], attributes={"B0LAMP": wants("brass")}, human={"B0LAMP": [HUMAN]}
    )
    paths[place] = paths[put]
    with pytest.raises(ConfigError, match=message):
        load_catalogue(**paths)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "attributes",
            {"B0LAMP": {"attributes": "brass"}},
            "attributes file .*: B0LAMP: attributes is 'brass'",
        ),
        (
            "attributes",
            {"B0LAMP": {"attributes": [], "instruction": 3}},
            "B0LAMP: instruction is 3, wanted a string",
        ),
        ("attributes", {"B0LAMP": {"instruction_attributes": [1]}}, "B0LAMP: instruction_attributes is"),
        ("attributes", {"B0LAMP": ["brass"]}, "attributes file .*B0LAMP.*wanted an object"),
        ("attributes", {}, "attributes file .*is empty"),
        (
            "human",
            {"B0LAMP": [HUMAN | {"instruction_options": "red"}]},
            "human file .*instruction_options is 'red'",
        ),
        ("human", {"B0LAMP": [{"instruction": "a"}]}, "human file .*B0LAMP: instruction_attributes is None"),
        ("human", {"B0LAMP": "lamp"}, "human file .*wanted a list of instructions"),
        ("products", [], "products file .*is empty"),
        ("products", [["lamp"]], "products file .*contains"),
    ],
)
def test_errors_name_the_file_and_the_field(name: str, content: Any, message: str, tmp_path: Path) -> None:
    files = {"products": [entry()], "attributes": {"B0LAMP": wants("brass")}, "human": {"B0LAMP": [HUMAN]}}
    paths = write(tmp_path, **files | {name: content})
    with pytest.raises(ConfigError, match=message):
        load_catalogue(**paths)


def test_files_are_found_by_their_official_names_or_named_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no products file .*items_shuffle\.json"):
        find_source(tmp_path, None, False)
    for name in ("items_shuffle_1000", "items_ins_v2_1000"):
        write(tmp_path, **{name: []})
    found = find_source(tmp_path, 5, False)
    assert (found.name, found.human, found.limit) == ("items_shuffle_1000", None, 5)
    with pytest.raises(ConfigError, match=r"no human file .*items_human_ins\.json"):
        find_source(tmp_path, None, True)
    write(tmp_path, items_shuffle=[])
    with pytest.raises(ConfigError, match=r"no attributes file .*items_ins_v2\.json"):
        find_source(tmp_path, None, False)
    paths = {"products": tmp_path / "items_shuffle.json"}
    with pytest.raises(ConfigError, match="has no path for the attributes file"):
        find_source(paths, None, False)
    with pytest.raises(ConfigError, match="'goals' is unknown"):
        find_source(paths | {"goals": tmp_path}, None, False)
    with pytest.raises(ConfigError, match="wanted a folder"):
        find_source(tmp_path / "items_shuffle.json", None, False)
    assert find_source(None, None, True).name == "generated"


def test_a_file_that_was_replaced_is_another_source(tmp_path: Path) -> None:
    paths = write(tmp_path, products=[entry()], attributes={"B0LAMP": wants("brass")})
    before = find_source(paths, None, False)
    assert before == find_source(paths, None, False)
    write(tmp_path, products=[entry(), entry("B0B")])
    assert before != find_source(paths, None, False)
