"""Conversations of others: what a row holds, and where a broken one stands."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.data import conversations
from agentrl.data.conversations import Exchange, read_conversations
from agentrl.errors import ConfigError

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say hi"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "nobody replies to this"},
    ],
    "task": "greet",
    "task_type": "talk",
    "env": "my/Talk-v0",
    "success": True,
    "return": 1,
}
AGENTGYM = {
    "item_id": "look_at_obj_7",
    "conversations": [
        {"from": "human", "loss": None, "value": "Interact with a household."},
        {"from": "gpt", "loss": False, "value": "OK. I will."},
        {"from": "human", "loss": None, "value": "You are in a room."},
        {"from": "gpt", "loss": True, "value": "Thought:\nlook\n\nAction:\ngo to desk 1"},
    ],
}
ETO = {
    "id": 12,
    "reward": 0.5,
    "conversations": [
        {"from": "human", "value": "You are web shopping."},
        {"from": "gpt", "value": "OK"},
        {"from": "human", "value": "red shoes"},
        {"from": "gpt", "value": "Thought: I think ...\nAction: search[red shoes]"},
    ],
}


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_chat_messages_are_read_with_what_is_known_of_them(tmp_path: Path) -> None:
    kind, (found,) = read_conversations(written(tmp_path, CHAT))
    assert kind == "chat messages"
    assert found.exchanges == (Exchange("say hi", "hi"),)
    assert (found.system, found.task, found.task_type, found.env) == (
        "Be brief.",
        "greet",
        "talk",
        "my/Talk-v0",
    )
    assert (found.success, found.episode_return, found.place) == (True, 1.0, f"{tmp_path}/data.jsonl, line 1")


def test_trajectories_of_agentgym_keep_their_mask(tmp_path: Path) -> None:
    path = tmp_path / "alfworld_train.json"
    path.write_text(json.dumps([AGENTGYM, AGENTGYM], indent=2))
    kind, found = read_conversations(path)
    assert kind == "AgentGym trajectories"
    assert [each.learned for each in found[0].exchanges] == [False, True]
    assert (found[0].task, found[0].success) == ("look_at_obj_7", None)
    lines = path.read_text().splitlines()
    second = len(lines) - 1 - lines[::-1].index("  {")
    assert [each.place for each in found] == [f"{path}, line 2", f"{path}, line {second + 1}"]


def test_trajectories_of_eto_are_learned_from_whole(tmp_path: Path) -> None:
    kind, (found,) = read_conversations(written(tmp_path, [ETO], name="sft.json"))
    assert kind == "ETO trajectories"
    assert [each.learned for each in found.exchanges] == [True, True]
    assert (found.task, found.episode_return) == ("12", 0.5)


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    lines = read_conversations(written(tmp_path, CHAT, "\n", ETO, name="a.json"))
    assert [lines[0], len(lines[1])] == ["chat messages and ETO trajectories", 2]
    assert lines[1][1].place.endswith("line 3")
    marked = tmp_path / "b.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps([CHAT]).encode())
    assert read_conversations(marked)[0] == "chat messages"


def message(role: Any = "user", content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PAIR = [message(), message("assistant")]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("{\n", "not JSON"),
        ("[1] x\n", r"'x' follows the list"),
        ("3\n", r"is 3, wanted a row"),
        ({"text": "x"}, r"has 'text', wanted a row \{\"messages\""),
        ({"messages": []}, r"messages is \[\], wanted a list of messages"),
        (
            {"messages": [message("robot")]},
            r"messages\[0\]\.role is \"robot\", wanted system, user or ",
        ),
        ({"messages": [message(), message()]}, r"messages\[1\] is the user's; wanted user and assistant to"),
        ({"messages": [message("assistant")]}, r"messages\[0\] is the assistant's"),
        ({"messages": [*PAIR, message("system")]}, r"messages\[2\] is the system's, wanted it first"),
        ({"messages": [message()]}, r"no message of the assistant"),
        ({"messages": [message(), message("assistant", "  ")]}, r"messages\[1\]\.content is empty"),
        (
            {"messages": [message(), message("assistant", None)]},
            r"messages\[1\]\.content is null",
        ),
        ({"messages": [message("assistant", None, tool_calls=[{}])]}, r"tool_calls: not read"),
        ({"messages": [message(), message("assistant", loss=0)]}, r"messages\[1\]\.loss is 0, wanted true"),
        ({"messages": PAIR, "success": "yes"}, r"success is \"yes\", wanted true, false or null"),
        ({"messages": PAIR, "return": float("nan")}, r"return is NaN, wanted a finite number"),
        ({"messages": PAIR, "task": []}, r"task is \[\], wanted text"),
        ({"messages": [message(content="\ud800"), PAIR[1]]}, r"half of a surrogate pair at 0"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            r"conversations\[0\]\.from is \"bot\", wanted",
        ),
        ({"conversations": "x"}, r"conversations is \"x\", wanted a list"),
        ('{"messages": ' + "[" * 100_000 + "\n", "not JSON"),
    ],
)
def test_a_broken_row_is_named_by_its_line(row: Any, wrong: str, tmp_path: Path) -> None:
    path = written(tmp_path, *([] if isinstance(row, str) and row[0] == "[" else [CHAT]), row)
    with pytest.raises(ConfigError, match=rf"{path}(, line 2)?: .*{wrong}"):
        read_conversations(path)


def test_several_broken_rows_are_named_at_once_but_not_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_conversations(written(tmp_path, *[{"messages": []}] * 9))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0][-6:] for line in lines[:5]] == [f"line {number}" for number in range(1, 6)]
    assert lines[5:] == [f"{tmp_path}/data.jsonl: more rows are broken"]


def test_broken_rows_before_one_that_is_no_json_are_named_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_conversations(written(tmp_path, {"messages": []}, "{bad\n", CHAT))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0][-6:] for line in lines] == ["line 1", "line 2"]
    assert "not JSON (Expecting property name enclosed in double quotes, column 2)" in lines[1]


def test_a_list_that_does_not_end_is_named_by_its_line(tmp_path: Path) -> None:
    for text, line in (("[\n" + json.dumps(CHAT), 2), ("[\n" + json.dumps(CHAT) + "\n5", 3), ("[\n\n{", 3)):
        with pytest.raises(ConfigError, match=rf"cut\.json, line {line}: "):
            read_conversations(written(tmp_path, text, name="cut.json"))


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    for content in ("", "\n \n", "[]"):
        with pytest.raises(ConfigError, match="is empty, wanted a row"):
            read_conversations(written(tmp_path, content))
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot be read"):
        read_conversations(tmp_path / "absent.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(ConfigError, match=r"line 1: not UTF-8 text \(byte 14"):
        read_conversations(tmp_path / "bytes.jsonl")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, CHAT, CHAT)
    monkeypatch.setattr(conversations, "MAX_ROW_BYTES", 100)
    with pytest.raises(ConfigError, match="line 1: longer than 100 bytes"):
        read_conversations(path)
    monkeypatch.setattr(conversations, "MAX_BYTES", 100)
    with pytest.raises(ConfigError, match="wanted at most 100; split it"):
        read_conversations(path)
