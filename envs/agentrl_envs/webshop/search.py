"""Product search with the ranking of the original shop's Lucene index: same documents, same order."""

import json
import logging
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from agentrl_envs.webshop.analysis import terms

K1, B = np.float32(0.9), np.float32(0.4)
FORMAT = 1  # of the files and of the analysis; raised when either changes
RUN = 4_000_000  # postings sorted in memory at a time while an index is built
CACHED_QUERIES = 4096
CACHED_TERMS = 1 << 16
MAX_CACHED_LENGTH = 256  # longer queries, in characters, are not cached

Arrays = dict[str, NDArray[Any]]
_ARRAYS = ("ids", "rank", "length", "words", "word_ends", "starts", "documents", "counts", "totals")

_META = "meta.json"
_NONE = -1
_log = logging.getLogger(__name__)


def document(title: str, description: str, first_bullet: str, options: Mapping[str, Sequence[str]]) -> str:
    """Return the searchable text of a product; `options` maps names to their values."""
    offered = ", and ".join(f"{name}: {', '.join(values)}" for name, values in options.items())
    return f"{title} {description} {first_bullet} {offered}".lower()


class SearchIndex:
    """BM25 (k1 0.9, b 0.4) over documents, with Lucene's arithmetic in float32 and lengths in eight bits.

    Create one with `build` or `open`. An index is immutable and thread-safe; an opened one is memory-mapped,
    so processes share its memory.
    """

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._ids, self._rank, self._length = arrays["ids"], arrays["rank"], arrays["length"]
        self._starts, self._documents, self._counts = arrays["starts"], arrays["documents"], arrays["counts"]
        self._words, self._word_ends = arrays["words"], arrays["word_ends"]
        self._filled, tokens = map(int, arrays["totals"])
        self._length_factor = _length_factors(self._filled, tokens)
        self._number = lru_cache(maxsize=CACHED_TERMS)(self._find)
        self._ranked = lru_cache(maxsize=CACHED_QUERIES)(self._rank_documents)

    def __len__(self) -> int:
        return len(self._ids)

    @classmethod
    def build(cls, ids: Sequence[str], texts: Iterable[str]) -> "SearchIndex":
        """Build an index of `texts` in memory; `ids` are in the same order."""
        return cls(_build(ids, texts, None))

    @classmethod
    def open(cls, folder: Path, data_hash: str) -> "SearchIndex":
        """Open a saved index; its arrays are memory-mapped.

        Raises:
            ValueError: The index is incomplete, or its format or data differ from the expected ones.
            OSError: The index is missing or cannot be read.
        """
        meta = json.loads((folder / _META).read_text())
        found = (meta.get("format"), meta.get("data_hash")) if isinstance(meta, dict) else None
        if found != (FORMAT, data_hash):
            raise ValueError(f"{folder}: format and data are {found}, wanted {(FORMAT, data_hash)}")
        for name in _ARRAYS:
            size, wanted = (folder / f"{name}.npy").stat().st_size, meta["sizes"][name]
            if size != wanted:
                raise ValueError(f"{folder / name}.npy: {size} bytes, wanted {wanted}")
        return cls({name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS})

    def save(self, folder: Path, data_hash: str) -> None:
        """Write the index to a folder; `data_hash` identifies its data."""
        _write(folder, self._arrays, data_hash)

    def search(self, query: str, k: int = 50) -> tuple[str, ...]:
        """Return the ids of the best `k` documents, best first and ties by id; none if no word is known."""
        return self._best(query, k)[0]

    def scores(self, query: str, k: int = 50) -> tuple[float, ...]:
        """Return the scores of `search(query, k)`."""
        return self._best(query, k)[1]

    def _best(self, query: str, k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        return (self._ranked if len(query) <= MAX_CACHED_LENGTH else self._rank_documents)(query, k)

    def _rank_documents(self, query: str, k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        wanted = {self._number(word): repeats for word, repeats in Counter(terms(query)).items()}
        wanted.pop(_NONE, None)
        if not wanted or k < 1:
            return (), ()
        spans = [slice(int(self._starts[number]), int(self._starts[number + 1])) for number in wanted]
        sizes = np.array([span.stop - span.start for span in spans])
        rarity = np.log(1 + (self._filled - sizes + 0.5) / (sizes + 0.5)).astype(np.float32)
        weights = rarity * np.array(list(wanted.values()), np.float32)
        documents = np.concatenate([self._documents[span] for span in spans])
        counts = np.concatenate([self._counts[span] for span in spans]).astype(np.float32)
        weight = np.repeat(weights, sizes)
        parts = weight - weight / (np.float32(1) + counts * self._length_factor[self._length[documents]])
        # Sums in double are exact here, so their order does not matter; Lucene rounds them to float32.
        scores = np.bincount(documents, parts, len(self._ids)).astype(np.float32)
        found = np.flatnonzero(scores)
        if len(found) > k:
            least = np.partition(scores[found], len(found) - k)[len(found) - k]
            found = found[scores[found] >= least]
        best = found[np.lexsort((self._rank[found], -scores[found]))][:k]
        return tuple(self._ids[best].tolist()), tuple(scores[best].tolist())

    def _find(self, word: str) -> int:
        """Return the number of a term, _NONE if no document contains it."""
        wanted = word.encode("utf-8", "surrogatepass")
        low, high = 0, len(self._word_ends)
        while low < high:
            middle = (low + high) // 2
            if self._word(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self._word_ends) and self._word(low) == wanted else _NONE

    def _word(self, number: int) -> bytes:
        start = int(self._word_ends[number - 1]) if number else 0
        return self._words[start : int(self._word_ends[number])].tobytes()


def open_index(ids: Sequence[str], texts: Iterable[str], data_hash: str, cache: Path | None) -> SearchIndex:
    """Return the index of some data, from the cache if it is there.

    If several processes need the same index, one builds it and the others wait. A cached index that is
    incomplete, or whose format or data differ, is rebuilt.

    Args:
        ids: The ids of the documents.
        texts: The texts of the documents, in the same order; not consumed if the index is cached.
        data_hash: The hash of the data that the documents are made from.
        cache: The folder for indexes of any data. None builds the index in memory.

    Raises:
        ValueError: The numbers of texts and ids differ.
        OSError: The cache cannot be written.
    """
    if cache is None:
        return SearchIndex.build(ids, texts)
    folder = cache / f"search-{data_hash[:16]}"
    if index := _opened(folder, ids, data_hash):
        return index
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if index := _opened(folder, ids, data_hash):
            return index
        _log.info("building the search index of %d documents in %s", len(ids), folder)
        unfinished = folder.with_suffix(".unfinished")
        for left_over in (folder, unfinished):
            shutil.rmtree(left_over, ignore_errors=True)
        unfinished.mkdir()
        _write(unfinished, _build(ids, texts, unfinished), data_hash)
        unfinished.rename(folder)
        return SearchIndex.open(folder, data_hash)


def _opened(folder: Path, ids: Sequence[str], data_hash: str) -> SearchIndex | None:
    try:
        index = SearchIndex.open(folder, data_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index if len(index) == len(ids) else None


def _write(folder: Path, arrays: Arrays, data_hash: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, values in arrays.items():
        file = folder / f"{name}.npy"
        if not (isinstance(values, np.memmap) and Path(str(values.filename)) == file.absolute()):
            np.save(file, values, allow_pickle=False)
        sizes[name] = file.stat().st_size
    meta = {"format": FORMAT, "data_hash": data_hash, "sizes": sizes}
    (folder / _META).write_text(json.dumps(meta))


def _build(ids: Sequence[str], texts: Iterable[str], folder: Path | None) -> Arrays:
    """Build the arrays of an index; with a folder, postings are stored in files there instead of memory."""
    postings = _Postings(folder)
    for text in texts:
        postings.add(Counter(terms(text)))
    lengths = np.array(postings.lengths, np.int64)
    if len(lengths) != len(ids):
        raise ValueError(f"texts: {len(lengths)} for {len(ids)} ids")
    rank = np.empty(len(ids), np.int32)
    rank[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    words, word_ends, starts, documents, counts = postings.inverted()
    return {
        "ids": np.array(ids, np.str_),
        "rank": rank,
        "length": _length_codes(lengths),
        "words": words,
        "word_ends": word_ends,
        "starts": starts,
        "documents": documents,
        "counts": counts,
        "totals": np.array([np.count_nonzero(lengths), lengths.sum()], np.int64),
    }


class _Postings:
    """Term counts of documents: added by document, returned by term."""

    def __init__(self, folder: Path | None) -> None:
        self.lengths = array("q")
        self._folder = folder
        self._numbers: dict[str, int] = {}
        self._found, self._counts, self._distinct = array("i"), array("I"), array("i")
        self._runs: list[NDArray[np.int32]] = []  # rows are terms in ascending order, documents and counts

    def add(self, bag: Mapping[str, int]) -> None:
        """Add the term counts of the next document."""
        numbers = self._numbers
        self.lengths.append(sum(bag.values()))
        self._found.extend([numbers.setdefault(word, len(numbers)) for word in bag])
        self._counts.extend(bag.values())
        self._distinct.append(len(bag))
        if len(self._found) >= RUN:
            self._close_run()

    def _close_run(self) -> None:
        last = len(self.lengths)
        documents = np.repeat(
            np.arange(last - len(self._distinct), last, dtype=np.int32), np.array(self._distinct)
        )
        rows = np.stack([np.array(self._found), documents, np.array(self._counts, np.int32)])
        run = rows[:, np.argsort(rows[0], kind="stable")]
        if self._folder is not None:
            file = self._folder / f"run-{len(self._runs)}.npy"
            np.save(file, run)
            run = np.load(file, mmap_mode="r")
        self._runs.append(run)
        for collected in (self._found, self._counts, self._distinct):
            del collected[:]

    def inverted(self) -> tuple[NDArray[Any], ...]:
        """Return the spelled terms, their ends, the starts of their postings, documents and counts."""
        self._close_run()
        spelled = sorted((word.encode(), number) for word, number in self._numbers.items())
        place = np.empty(len(spelled), np.int64)
        place[[number for _, number in spelled]] = np.arange(len(spelled))
        words = np.frombuffer(b"".join(word for word, _ in spelled), np.uint8)
        word_ends = np.cumsum([len(word) for word, _ in spelled], dtype=np.int64)
        sizes = np.zeros(len(spelled), np.int64)
        for run in self._runs:
            sizes[place] += np.bincount(run[0], minlength=len(spelled))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        most = max((int(run[2].max()) for run in self._runs if run.size), default=0)
        documents = self._allocated("documents", int(starts[-1]), np.dtype(np.int32))
        counts = self._allocated("counts", int(starts[-1]), np.min_scalar_type(most))
        free = starts[:-1].copy()
        for run in self._runs:
            first = np.flatnonzero(np.diff(run[0], prepend=-1))
            amount = np.diff(first, append=run.shape[1])
            target = place[run[0][first]]
            to = np.repeat(free[target] - first, amount) + np.arange(run.shape[1])
            documents[to], counts[to] = run[1], run[2]
            free[target] += amount
        if self._folder is not None:
            for number in range(len(self._runs)):
                (self._folder / f"run-{number}.npy").unlink()
        return words, word_ends, starts, documents, counts

    def _allocated(self, name: str, size: int, kind: np.dtype[Any]) -> NDArray[Any]:
        if self._folder is None:
            return np.empty(size, kind)
        # An empty file cannot be mapped.
        file = self._folder / f"{name}.npy"
        return np.lib.format.open_memmap(file, "w+", kind, (size,)) if size else np.empty(size, kind)


def _length_codes(lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Quantize document lengths as Lucene does: exact below 40, then four significant bits."""
    rest = lengths - 24
    shift = np.maximum(np.frexp(np.maximum(rest, 1))[1].astype(np.int64) - 4, 0)
    coded = np.where(rest >= 8, ((rest >> shift) & 7) | (shift + 1) << 3, rest)
    return np.where(lengths < 24, lengths, 24 + coded).astype(np.uint8)


def _length_factors(filled: int, tokens: int) -> NDArray[np.float32]:
    """Return 1 / (k1 (1 - b + b length / average)) for every length code."""
    codes = np.arange(256) - 24
    shift = np.maximum((codes >> 3) - 1, 0)
    decoded = np.where(codes < 8, codes, ((codes & 7) | 8) << shift) + 24
    lengths = np.where(codes < 0, codes + 24, decoded).astype(np.float32)
    average = np.float32(tokens / max(filled, 1)) or np.float32(1)
    one = np.float32(1)
    return one / (K1 * ((one - B) + B * lengths / average))
