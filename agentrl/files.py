"""Write files and folders atomically, and check the contents of JSON files on reading."""

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
    """Yield a temporary path to write to, and move that file to `path` at the end of the `with` block.

    Raises:
        CheckpointError: `path` is a folder.
        OSError: `path` cannot be written; the error names it, and an existing file is unchanged.
    """
    target = Path(path)
    partial = _beside(target, "partial")
    try:
        yield partial
        _flush(partial)
        if target.is_dir() and not target.is_symlink():
            raise CheckpointError(f"{target}: is a folder, but a file is to be written there; remove it")
        os.replace(partial, target)
        _flush(target.parent)
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file that is never left half-written, even by a kill, a full disk or a power failure."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def begin_folder(target: Path) -> Path:
    """Create a temporary folder next to `target`, to be filled and passed to `finish_folder`."""
    partial = _beside(target, "partial")
    partial.mkdir()
    return partial


def finish_folder(partial: Path, target: Path, *, over: bool = True) -> None:
    """Flush a filled folder to disk and move it to `target`.

    Args:
        partial: The folder from `begin_folder`.
        target: The final path.
        over: Whether to replace an existing folder.

    Raises:
        OSError: The folder cannot be moved, for example because `target` exists and `over` is False.
    """
    for root, _, names in os.walk(partial):
        for name in names:
            _flush(Path(root, name))
        _flush(Path(root))
    old = _beside(target, "old")  # rename() cannot replace a folder that is not empty, so move that one away
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
    """Yield a temporary folder to fill, and move it to `target` at the end of the `with` block.

    Raises:
        OSError: The folder cannot be moved, for example because `target` exists and `over` is False.
    """
    partial = begin_folder(target)
    try:
        yield partial
        finish_folder(partial, target, over=over)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill midway never leaves part of it under its name."""
    old = _beside(path, "old")
    path.rename(old)
    _discard(old)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder that no other process is writing to."""
    for pattern in ("*.partial", ".*.old", ".*.new"):
        for path in folder.glob(pattern):
            _discard(path)


def read_json(path: Path, shape: Any, remedy: str) -> Any:
    """Read a JSON file and check the type of its content.

    Args:
        path: The path of the file.
        shape: The type of the content as pydantic understands it, such as `dict[str, float]` or a TypedDict.
        remedy: What to do about a damaged file; ends the error message.

    Raises:
        CheckpointError: The file cannot be read, is not JSON, or its content has another type.
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
    """Check that content read from `path` has the type `shape`; see `read_json`.

    Raises:
        CheckpointError: It does not; the message names the first place where it differs.
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
    """Return a path next to `target` that no other process or thread uses."""
    return target.with_name(f".{target.name}.{os.getpid()}-{next(_COUNT)}.{kind}")


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot fsync a folder
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
