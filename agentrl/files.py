"""Files and folders on disk: they appear whole or not at all, and are read as what they should hold."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from agentrl.errors import CheckpointError

_COUNT = itertools.count()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Have the block write a file beside `path`, which takes its place once it is whole and on the disk.

    Raises:
        CheckpointError: when a folder stands in its place.
        OSError: naming `path`, when it cannot be written; what was there is as before.
    """
    target = Path(path)
    partial = _beside(target, "partial")
    try:
        yield partial
        _flush(partial)
        if target.is_dir() and not target.is_symlink():
            raise CheckpointError(f"{target}: a folder stands where a file is to be written; remove it")
        os.replace(partial, target)
        _flush(target.parent)
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a file so that a reader, a kill, a full disk or a power cut never leaves half of it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def begin_folder(target: Path) -> Path:
    """Make a folder beside `target`, to be filled and then given to `finish_folder`."""
    partial = _beside(target, "partial")
    partial.mkdir()
    return partial


def finish_folder(partial: Path, target: Path, *, over: bool = True) -> None:
    """Put a filled folder in the place of `target` once all of it is on the disk.

    Raises:
        OSError: when it cannot, as where `target` is there and not to be written `over`.
    """
    for root, _, names in os.walk(partial):
        for name in names:
            _flush(Path(root, name))
        _flush(Path(root))
    old = _beside(target, "old")  # a folder cannot replace one that holds files, so that one steps aside
    if not over or not os.path.lexists(target):
        partial.rename(target)
    else:
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if not target.exists():
                old.rename(target)
            raise
    _flush(target.parent)
    _discard(old)


@contextmanager
def replacing_folder(target: Path, *, over: bool = True) -> Iterator[Path]:
    """Have the block fill a folder beside `target`, which takes its place once it is whole and on the disk.

    Raises:
        OSError: when it cannot, as where `target` is there and not to be written `over`.
    """
    partial = begin_folder(target)
    try:
        yield partial
        finish_folder(partial, target, over=over)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill in between leaves nothing that could be taken for a whole one."""
    old = _beside(path, "old")
    path.rename(old)
    _discard(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder. Only for one that nobody else writes into."""
    for pattern in ("*.partial", ".*.old", ".*.new"):
        for path in folder.glob(pattern):
            _discard(path)


def read_json(path: Path, shape: Any, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        shape: type that the content must have, as pydantic reads it: `dict[str, float]`, a TypedDict.
        remedy: what to do about a damaged file.

    Raises:
        CheckpointError: when it cannot be read, is no JSON, or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({_brief(error)}); {remedy}") from error
    check_shape(path, tree, shape, remedy)
    return tree


def check_shape(path: Path | str, tree: Any, shape: Any, remedy: str) -> None:
    """Refuse what was read from `path` unless it has a shape.

    Raises:
        CheckpointError: naming the first place that has not.
    """
    try:
        _adapter(shape).validate_python(tree, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its top level"
        raise CheckpointError(f"{path}: damaged, {place}: {_brief(first['msg'])}; {remedy}") from error
    except (OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({_brief(error)}); {remedy}") from error


@lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _brief(what: object) -> str:
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _beside(target: Path, kind: str) -> Path:
    """A name that no other process or thread takes."""
    return target.with_name(f".{target.name}.{os.getpid()}-{next(_COUNT)}.{kind}")


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot flush a folder
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
