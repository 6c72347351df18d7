"""WebShop's search: terms and rankings are Lucene's, and an incomplete index on disk is rebuilt."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nltk", reason="extra webshop")
pytest.importorskip("regex", reason="extra webshop")

from agentrl_envs.webshop import search as search_module
from agentrl_envs.webshop.analysis import STOP_WORDS, term, terms, words
from agentrl_envs.webshop.search import SearchIndex, document, open_index

IDS = ["B3", "B1", "B2", "B4"]
TEXTS = ["red running shoes", "red shoes for running in the rain", "blue rug", "Shoes, shoes, shoes!"]


def real_documents(folder: Path) -> dict[str, str]:
    found = {}
    for product in json.loads((folder / "webshop/data/items_shuffle_1000.json").read_text()):
        bullets = product["small_description"]
        options = {
            name.lower(): [value["value"].strip().replace("/", " | ").lower() for value in values]
            for name, values in (product["customization_options"] or {}).items()
            if values is not None
        }
        first = bullets if isinstance(bullets, str) else (bullets or [""])[0]
        found[product["asin"]] = document(product["name"], product["full_description"], first, options)
    return found


@pytest.mark.reference
def test_terms_of_real_documents_are_lucenes(reference_folder: Path) -> None:
    recorded = json.loads((reference_folder / "webshop/golden/lucene_doc_tokens_every4th.json").read_text())
    texts = list(real_documents(reference_folder).values())[::4]
    equal = sum(terms(text) == wanted for text, wanted in zip(texts, recorded, strict=True))
    print(f"terms: {equal} of {len(recorded)} documents equal")
    assert equal == len(recorded) == 250


@pytest.mark.reference
def test_rankings_of_real_queries_are_lucenes(reference_folder: Path) -> None:
    recorded = json.loads((reference_folder / "webshop/golden/lucene_top50.json").read_text())
    texts = real_documents(reference_folder)
    index = SearchIndex.build(list(texts), texts.values())
    equal = hits = 0
    for one in recorded:
        wanted = tuple(name for name, _ in one["hits"])
        equal += index.search(one["q"]) == wanted
        hits += len(wanted)
        scores = [score for _, score in one["hits"]]
        np.testing.assert_allclose(
            index.scores(one["q"]), scores, rtol=0, atol=5.1e-5
        )  # recorded to 4 digits
    print(f"rankings: {equal} of {len(recorded)} queries equal, {hits} hits")
    assert equal == len(recorded) == 118
    assert hits > 5000


CUTS = {
    "can't 3,5 1.5.2 a.b a:b 3:5 x,y 1a.2 _a__b_ ___ a-b": "can't|3,5|1.5.2|a.b|a:b|3|5|x|y|1a|2|_a__b_|a|b",
    "rock'n'roll 'quoted' men’s 10'000 5' 6''": "rock'n'roll|quoted|men’s|10'000|5|6",
    "日本語 カタカナ ひら 한국어 ｶﾅ": "日|本|語|カタカナ|ひ|ら|한국어|ｶﾅ",
    "カ_カa": "カ_カ|a",
    "ภาษาไทยx ລາວ": "ภาษาไทย|x|ລາວ",
    'צה"ל ג\'ירפה א"ב"ג א\' "א"': "צה\"ל|ג'ירפה|א\"ב|ג|א'|א",
    'x.א"ב אב"ג': 'x.א|ב|אב"ג',
    "e\u0301a\u00ad\u200bb \u0301c": "e\u0301a\u00ad|b|c",
    "★best♥ ©2020 ™ → ✓ •": "★|best|♥|©|2020|™",
    "👍🏽👍 👩‍💻x 👨‍👩‍👧 🇩🇪🇫🇷 1️⃣ #️⃣ # ❤️‍🔥": "👍🏽|👍|👩‍💻|x|👨‍👩‍👧|🇩🇪|🇫🇷|1️⃣|#️⃣|❤️‍🔥",
    "🏴\U000e0067\U000e0062\U000e007fx": "🏴\U000e0067\U000e0062\U000e007f|x",
    "ℹabc Ⓜ\u200d😀 🅰🅱": "ℹabc|Ⓜ\u200d😀|🅰🅱",
    "½ 10² x² ５％ 𝐚𝟏": "10|x|５|𝐚𝟏",
    "ß ſ İ a\u00b8b \u02d7 \ua7c0": "ß|ſ|İ|a|b",
}


@pytest.mark.parametrize("text", CUTS)
def test_words_are_cut_by_unicode_word_break_and_emoji_sequences(text: str) -> None:
    assert words(text) == CUTS[text].split("|")


def test_ascii_and_other_text_are_cut_alike() -> None:
    for text in ("a.b,c;d:e'f 1.2,3;4:5'6 _1_a1.b2_ 'x' a..b a.1 1.a", *TEXTS):
        assert words(text + " é")[:-1] == words(text)


def test_words_are_cut_at_255_utf_16_units() -> None:
    def lengths(text: str) -> list[int]:
        return list(map(len, words(text)))

    assert lengths("a" * 600) == [255, 255, 90]
    assert lengths("é" * 256 + " b") == [255, 1, 1]
    assert lengths("𝐚" * 200) == [127, 73]
    assert lengths("a" + "_" * 300 + "b") == [255, 47]
    assert lengths("_" * 300 + "b") == [255]
    assert lengths("1," * 200) == [255, 143]
    assert lengths("_" * 300 + "é.") == [255]


def test_the_time_for_odd_texts_grows_with_their_length_only() -> None:
    for piece in ("_", "א", 'א"', "א_", "a1.", "😀\u200d", "\u0301\u200d", "ก", "ℹカ_", "é_"):
        assert sum(map(len, words(piece * 20_000))) <= 20_000 * len(piece)


def test_terms_are_stemmed_lower_case_words_without_possessives_and_stop_words() -> None:
    assert terms("The Women's RUNNING shoes’S and ponies") == ["women", "run", "shoe", "poni"]
    assert terms("sensibly psychology generically") == ["sensibl", "psycholog", "gener"]
    assert terms("as is us yes") == ["us", "ye"]
    assert terms("İSTANBUL ΣΑΣ 𝐚s") == ["istanbul", "σασ", "𝐚"]
    assert len(STOP_WORDS) == 33
    assert terms(" ".join(sorted(STOP_WORDS)).upper()) == []


def test_a_document_is_title_description_first_bullet_and_options() -> None:
    options = {"color": ("red", "light blue"), "size": ("5",)}
    assert (
        document("A Shoe", "Good.", "Light", options)
        == "a shoe good. light color: red, light blue, and size: 5"
    )
    assert document("A", "", "", {}) == "a   "


def test_scores_are_bm25() -> None:
    index = SearchIndex.build(IDS, TEXTS)
    assert len(index) == 4
    assert index.search("shoes") == ("B4", "B3", "B1")
    # df 3 of 4, mean length (3 + 4 + 2 + 3) / 4 = 3: "in", "the" and "for" are not words.
    idf = np.log(1 + (4 - 3 + 0.5) / (3 + 0.5))
    for got, count, length in zip(index.scores("shoes"), (3, 1, 1), (3, 3, 4), strict=True):
        assert got == pytest.approx(idf * count / (count + 0.9 * (0.6 + 0.4 * length / 3)), rel=1e-6)
    assert index.scores("shoes shoes")[0] == pytest.approx(2 * index.scores("shoes")[0], rel=1e-6)


def test_equal_scores_are_ranked_by_id_and_k_cuts() -> None:
    index = SearchIndex.build(["c", "a", "d", "b"], ["red rug", "red rug", "red rug big rug", "red rug"])
    assert index.search("red") == ("a", "b", "c", "d")
    assert index.search("red", 2) == ("a", "b")
    assert index.search("rug", 3) == ("d", "a", "b")
    assert index.search("red", 0) == ()


@pytest.mark.parametrize("query", ["", "   ", "the", "unheard", "!?", "\ud800", "a" * 1000])
def test_a_query_without_a_known_word_finds_nothing(query: str) -> None:
    assert SearchIndex.build(IDS, TEXTS).search(query) == ()


def test_long_documents_have_lengths_of_four_bits() -> None:
    wanted = {0: 0, 1: 1, 23: 23, 24: 24, 39: 39, 40: 40, 41: 40, 42: 42, 56: 56, 59: 56, 255: 248, 1000: 984}
    lengths = np.array(list(wanted), np.int64)
    codes = search_module._length_codes(lengths)
    factors = search_module._length_factors(1, 100)
    decoded = [round((1 / float(factors[code]) / 0.9 - 0.6) / 0.4 * 100) for code in codes]
    assert decoded == list(wanted.values())
    every = search_module._length_codes(np.arange(200_000))
    assert (np.diff(every.astype(int)) >= 0).all()


def test_an_index_in_runs_equals_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"word{number % 7} word{number % 11} shared " * (number % 5) for number in range(300)]
    ids = [f"id{number}" for number in range(300)]
    whole = SearchIndex.build(ids, texts)
    monkeypatch.setattr(search_module, "RUN", 50)
    in_runs = open_index(ids, iter(texts), "data", tmp_path)
    for query in ("shared", "word3 word4", "word1 word1 word1 shared"):
        assert in_runs.search(query) == whole.search(query) != ()
        assert in_runs.scores(query) == whole.scores(query)
    assert not list(tmp_path.rglob("run-*"))


def test_indexes_without_words_or_documents_find_nothing(tmp_path: Path) -> None:
    for ids, texts in (([], []), (["a"], [""])):
        index = open_index(ids, texts, f"data{len(ids)}", tmp_path)
        assert index.search("a word") == ()
        assert len(open_index(ids, iter(()), f"data{len(ids)}", tmp_path)) == len(ids)


def test_texts_and_ids_have_to_be_as_many() -> None:
    with pytest.raises(ValueError, match="3 for 4"):
        SearchIndex.build(IDS, TEXTS[:3])


def test_a_saved_index_is_memory_mapped_and_equal(tmp_path: Path) -> None:
    index = SearchIndex.build(IDS, TEXTS)
    index.save(tmp_path / "index", "data")
    opened = SearchIndex.open(tmp_path / "index", "data")
    assert isinstance(opened._documents.base, np.memmap)
    for query in ("red", "rug", "running shoes"):
        assert opened.search(query) == index.search(query) != ()
    with pytest.raises(ValueError, match=r"wanted \(1, 'other'\)"):
        SearchIndex.open(tmp_path / "index", "other")


def unread() -> Iterator[str]:
    raise AssertionError("the texts were looked at")
    yield ""


def test_an_index_in_the_cache_is_used_without_reading_the_texts(tmp_path: Path) -> None:
    open_index(IDS, TEXTS, "data", tmp_path)
    assert open_index(IDS, unread(), "data", tmp_path).search("rug") == ("B2",)


def spoil(folder: Path, how: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    if how == "truncated array":
        os.truncate(folder / "counts.npy", (folder / "counts.npy").stat().st_size - 1)
    elif how == "absent array":
        (folder / "words.npy").unlink()
    elif how == "truncated meta":
        (folder / "meta.json").write_text(json.dumps(meta)[:-3])
    elif how == "odd meta":
        (folder / "meta.json").write_text("[]")
    elif how == "no sizes":
        (folder / "meta.json").write_text(json.dumps({**meta, "sizes": None}))
    elif how == "no array":
        (folder / "starts.npy").write_bytes(b"x" * meta["sizes"]["starts"])
    else:
        (folder / "meta.json").write_text(json.dumps({**meta, how: "other"}))


@pytest.mark.parametrize(
    "how",
    [
        *("truncated array", "absent array", "truncated meta", "odd meta", "no sizes", "no array"),
        *("format", "data_hash"),
    ],
)
def test_a_spoilt_or_foreign_index_is_built_anew(tmp_path: Path, how: str) -> None:
    open_index(["X"], ["blue rug"], "data", tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    spoil(folder, how)
    if how == "data_hash":
        assert open_index(["X"], ["red rug"], "data", tmp_path).search("red") == ("X",)
    else:
        assert open_index(IDS, TEXTS, "data", tmp_path).search("blue") == ("B2",)
    assert open_index(["X"] if how == "data_hash" else IDS, unread(), "data", tmp_path) is not None


def test_indexes_of_several_data_live_side_by_side(tmp_path: Path) -> None:
    open_index(IDS, TEXTS, "first", tmp_path)
    open_index(["X"], ["green rug"], "second", tmp_path)
    assert open_index(IDS, unread(), "first", tmp_path).search("rug") == ("B2",)
    assert open_index(["X"], unread(), "second", tmp_path).search("rug") == ("X",)


def told(texts: list[str], cache: Path, delay: float) -> Iterator[str]:
    with (cache / "builders").open("a") as file:
        file.write(f"{os.getpid()}\n")
    for text in texts:
        time.sleep(delay)
        yield text


def ask(cache: Path, delay: float, answers: Any) -> None:
    answers.put(open_index(IDS, told(TEXTS, cache, delay), "data", cache).search("running shoes"))


def test_of_processes_that_ask_at_once_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=ask, args=(tmp_path, 0.2, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [("B3", "B1", "B4")] * 3
    assert len((tmp_path / "builders").read_text().split()) == 1


def test_a_killed_builder_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=ask, args=(tmp_path, 60.0, answers))
    worker.start()
    while not (tmp_path / "builders").exists():
        assert worker.is_alive()
        time.sleep(0.01)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".unfinished"]
    assert open_index(IDS, TEXTS, "data", tmp_path).search("rug") == ("B2",)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [""]


def test_long_queries_and_words_are_answered_and_not_kept() -> None:
    index = SearchIndex.build(IDS, TEXTS)
    query = "red shoes " * 100
    assert index.search(query) == index.search("red shoes")
    assert index._ranked.cache_info().currsize == 1
    before = term.cache_info().currsize
    assert terms("x" * 200 + " " + "z" * 33) == ["x" * 200, "z" * 33]
    assert term.cache_info().currsize == before
