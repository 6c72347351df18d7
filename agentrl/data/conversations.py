"""Conversations that others wrote: chat messages, and the trajectories of AgentGym and ETO, as text."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import ConfigError

MAX_BYTES = 2**30  # of a file, which is read as a whole
MAX_ROW_BYTES = 64 * 2**20  # of a row of it
_MAX_FAULTS = 5  # broken rows that an error names

CHAT, AGENTGYM, ETO = "chat messages", "AgentGym trajectories", "ETO trajectories"
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Exchange:
    """Turn of a conversation: a message and the reply to it, which is context if it is not learned from."""

    said: str
    reply: str
    learned: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Exchanges of an episode, and what is known of it; None is unknown.

    Args:
        place: Where it stands, such as "FILE, line 3".
        exchanges: What was said, and the replies.
        system: The system message.
        played: Whether `said` are an environment's observations; otherwise they are whole messages.
        written: Whether replies are whole, as they are written; otherwise they are commands.
        env: The id of the environment.
        task: The task.
        task_type: The kind of task.
        success: Whether it was solved.
        episode_return: The sum of rewards.
    """

    place: str
    exchanges: tuple[Exchange, ...]
    system: str | None = None
    played: bool = False
    written: bool = True
    env: str | None = None
    task: str | None = None
    task_type: str | None = None
    success: bool | None = None
    episode_return: float | None = None


def read_conversations(path: str | Path) -> tuple[str, list[Conversation]]:
    """Read a file of JSON Lines, or of a JSON list, and return the kind of its rows with their content.

    Chat messages are rows with `messages` of `role` and `content`; trajectories are rows with `conversations`
    of `from` and `value`, where those of AgentGym also have `item_id`, or a `loss` in their messages.

    Raises:
        ConfigError: The file cannot be read, or rows are broken; the first of them are named by their lines.
    """
    file = Path(path)
    faults: list[str] = []
    found: list[Conversation] = []
    kinds: list[str] = []
    try:
        for line, row in _rows(file):
            place = f"{file}, line {line}"
            try:
                kinds.append(_kind_of(row))
                found.append(_conversation(row, place))
            except _FaultError as fault:
                faults.append(f"{place}: {fault}")
                if len(faults) > _MAX_FAULTS:
                    break
    except ConfigError as error:  # what follows cannot be read
        faults.append(str(error))
    if len(faults) > _MAX_FAULTS:
        faults[_MAX_FAULTS:] = [f"{file}: more rows are broken"]
    if faults:
        raise ConfigError("\n".join(faults))
    if not found:
        raise ConfigError(f"{file}: is empty, wanted {_WANTED_ROW}")
    return " and ".join(dict.fromkeys(kinds)), found


class _FaultError(ValueError):
    """Error of a row that is not in the format."""


_WANTED_ROW = 'a row {"messages": [{"role": "user", "content": "..."}, ...]} or {"conversations": [...]}'


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file, each with the line that it begins in."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{file}: has {size:,} bytes, wanted at most {MAX_BYTES:,}; split it")
        with file.open("rb") as opened:
            start = opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        yield from _items(file) if start == b"[" else _lines(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of JSON Lines."""
    with file.open("rb") as opened:
        number = 0
        while content := opened.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(content) > MAX_ROW_BYTES:
                raise ConfigError(f"{file}, line {number}: longer than {MAX_ROW_BYTES:,} bytes")
            if content.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, _parse(content, f"{file}, line {number}")


def _parse(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 text (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(f"{place}: not JSON ({why}); wanted {_WANTED_ROW} in one line") from error


def _items(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start})") from error
    decoder, counted, line = json.JSONDecoder(), 0, 1
    place = _skip_space(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            wrong = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise ConfigError(f"{file}, line {wrong}: not JSON ({error})") from error
        yield line, row
        place = _skip_space(text, end)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            wrong = line + text.count("\n", counted, place)
            raise ConfigError(f"{file}, line {wrong}: the list goes on without a comma, or does not end")
    if rest := text[place + 1 :].strip():
        raise ConfigError(f"{file}: {rest[:20]!r} follows the list")


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _kind_of(row: Any) -> str:
    if not isinstance(row, dict):
        raise _FaultError(f"is {_brief(row)}, wanted {_WANTED_ROW}")
    if "messages" in row:
        return CHAT
    if "conversations" not in row:
        raise _FaultError(f"has {', '.join(map(repr, row)) or 'no keys'}, wanted {_WANTED_ROW}")
    content = row["conversations"]
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        raise _FaultError(f"conversations is {_brief(content)}, wanted a list of messages")
    if "role" in content[0]:
        return CHAT
    return AGENTGYM if "item_id" in row or any("loss" in each for each in content if each) else ETO


def _conversation(row: Mapping[str, Any], place: str) -> Conversation:
    key = "messages" if "messages" in row else "conversations"
    listed = row[key]
    if not isinstance(listed, list) or not listed:
        raise _FaultError(f"{key} is {_brief(listed)}, wanted a list of messages")
    messages = [_message(message, f"{key}[{index}]") for index, message in enumerate(listed)]
    system = None
    if messages[0][0] == "system":
        system = messages.pop(0)[1]
    shift = len(listed) - len(messages)
    exchanges = []
    for index, (role, text, learned) in enumerate(messages):
        wanted = "assistant" if index % 2 else "user"
        if role != wanted:
            what = "the system's, wanted it first" if role == "system" else f"the {role}'s"
            raise _FaultError(
                f"{key}[{index + shift}] is {what}; wanted user and assistant to take turns, the user first"
            )
        if index % 2:
            exchanges.append(Exchange(messages[index - 1][1], text, learned))
    if not exchanges:
        raise _FaultError(f"{key} has no message of the assistant, wanted one to learn from")
    names = [name for name in ("task", "item_id", "id", "game_file") if row.get(name) is not None]
    value = row.get("return", row.get("reward"))
    return Conversation(
        place,
        tuple(exchanges),
        system,
        env=_text(row, "env"),
        task=_text(row, names[0]) if names else None,
        task_type=_text(row, "task_type"),
        success=_flag(row, "success"),
        episode_return=None if value is None else _number(value),
    )


def _message(message: Any, name: str) -> tuple[str, str, bool]:
    """Return the role of a message, its text, and whether it is learned from."""
    if not isinstance(message, dict):
        raise _FaultError(f"{name} is {_brief(message)}, wanted a message of role and content")
    ours = "role" in message
    who, what = ("role", "content") if ours else ("from", "value")
    if (given := message.get(who)) not in _ROLES or not isinstance(given, str):
        wanted = "system, user or assistant" if ours else "human or gpt, or a message of role and content"
        raise _FaultError(f"{name}.{who} is {_brief(given)}, wanted {wanted}")
    if message.get("tool_calls"):
        raise _FaultError(f"{name}.tool_calls: not read, wanted the call as text in {what}")
    text = message.get(what)
    if not isinstance(text, str):
        raise _FaultError(f"{name}.{what} is {_brief(text)}, wanted text")
    _check_text(text, f"{name}.{what}")
    if _ROLES[given] == "assistant" and not text.strip():
        raise _FaultError(f"{name}.{what} is empty, wanted a reply")
    loss = _flag(message, "loss", f"{name}.")
    return _ROLES[given], text, loss is not False


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _FaultError(f"{name} has half of a surrogate pair at {error.start}, wanted text") from error


def _text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise _FaultError(f"{key} is {_brief(value)}, wanted text")
    if value is not None:
        _check_text(value, key)
    return value


def _flag(row: Mapping[str, Any], key: str, path: str = "") -> bool | None:
    value = row.get(key)
    if value is not None and not isinstance(value, bool):
        raise _FaultError(f"{path}{key} is {_brief(value)}, wanted true, false or null")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise _FaultError(f"return is {_brief(value)}, wanted a finite number")
    try:
        return float(value)
    except OverflowError as error:
        raise _FaultError("return is too large") from error


def _brief(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a very large integer"
    return text if len(text) <= 60 else f"{text[:57]}..."
