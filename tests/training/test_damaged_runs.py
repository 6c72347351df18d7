"""Every file of a run's folder, damaged in every way, is refused by name or does no harm by a stated rule."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentrl
from agentrl.errors import AgentRLError, CheckpointError
from agentrl.evaluation.report import write_report
from agentrl.run.folder import open_run
from agentrl.run.settings import load_config

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=2",
    "warm_start.steps=2",
    "warm_start.batch_size=2",
    "warm_start.demonstrations=4",
    "trainer.steps=3",
    "trainer.checkpoint_every=2",
    "trainer.save_episodes_every=2",
    "policy.hidden_size=16",
    "policy.layers=1",
    "policy.heads=1",
    "policy.tokenizer_episodes=2",
    "rollout.groups_per_step=2",
    "rollout.group_size=3",
    "rollout.placement=inline",
)
NEWEST = "checkpoints/train-000003"
COMMANDS: dict[str, Callable[[Path], Any]] = {
    "resume": lambda run: agentrl.resume(run, quiet=True),
    "report": lambda run: write_report(open_run(run).folder),
    "evaluate": lambda run: agentrl.evaluate(str(run), temperature=0.0),
    "config": lambda run: load_config(run / "config.yaml"),
}
# What each command reads; all else may be in whatever state it is.
READS = {
    "resume": (
        *("config.yaml", "manifest.json", "metrics.jsonl", "evaluations.json", "clocks.json"),
        *(f"{NEWEST}/*", "tokenizer/*"),
    ),
    "report": ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json"),
    "evaluate": ("config.yaml", "manifest.json", "model/*"),
    "config": ("config.yaml",),
}
# What a command replaces, which must not be a folder: all of it is made from what else is there.
WRITES = {"resume": ("summary.json", "report.html"), "report": ("report.html",)}
# Command, file, damage -> harmless, and why.
HARMLESS = {
    # A run may have been moved by hand without its manifest.
    ("*", "manifest.json", "missing"),
    # Each key of it may be absent, as in runs of earlier versions.
    ("*", "manifest.json", "{}"),
    ("*", "manifest.json", "a key less"),
    # The timers restart.
    ("resume", "clocks.json", "missing"),
    ("resume", "clocks.json", "{}"),
    ("resume", "clocks.json", "a key less"),
    # Rows that are lost are warned of; a last line without an end is no row.
    ("resume", "metrics.jsonl", "missing"),
    ("report", "metrics.jsonl", "missing"),
    ("report", "metrics.jsonl", "empty"),
    ("report", "metrics.jsonl", "half"),
    ("report", "metrics.jsonl", "{}"),
    # A report of what is there.
    ("report", "summary.json", "missing"),
    # As in any configuration, what is not said takes its default, and numbers are checked by their keys.
    ("config", "config.yaml", "empty"),
    ("config", "config.yaml", "null"),
    ("config", "config.yaml", "{}"),
    ("config", "config.yaml", "half"),
    ("config", "config.yaml", "a key less"),
    # The library that reads them knows which of them it can do without.
    ("resume", "tokenizer/*", "*"),
    ("evaluate", "model/*", "*"),
}


def replaced(tree: Any, found: Callable[[Any], bool], new: Any) -> Any:
    """The tree with its first value of a kind replaced."""
    done = []

    def walk(node: Any) -> Any:
        if not done and found(node):
            done.append(True)
            return new
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        return [walk(value) for value in node] if isinstance(node, list) else node

    return walk(tree)


def without_a_key(tree: Any) -> Any:
    """Without a score's rate, else without the first key of its first innermost block."""
    if isinstance(tree, dict):
        if "success_rate" in tree:
            return {key: value for key, value in tree.items() if key != "success_rate"}
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                return tree | {key: without_a_key(value)}
        return dict(list(tree.items())[1:])
    return tree


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Name and new content of a damaged file; None for none."""
    whole = path.read_bytes()
    yield "missing", None
    yield "empty", b""
    yield "half", whole[: len(whole) // 2]
    yield "garbage", bytes(range(255, 0, -1)) + b"\n"
    yield "not UTF-8", b'{"a": "\xff\xfe"}\n'
    for text in ("[]", "{}", "null", "3", '"text"'):
        yield text, text.encode() + b"\n"
    yield "huge integer", b'{"step": ' + b"9" * 5000 + b"}\n"
    yield "deep", b"[" * 100_000 + b"\n"
    if path.suffix in (".json", ".jsonl") and path.name != "tokenizer.json":
        lines = whole.splitlines() if path.suffix == ".jsonl" else [whole]
        tree, rest = json.loads(lines[-1]), lines[:-1]
        for name, other in {
            "a key less": {key: value for key, value in tree.items() if key != "step"}
            if path.suffix == ".jsonl"
            else without_a_key(tree),
            "NaN": replaced(tree, is_number, float("nan")),
            "wrong type": replaced(tree, is_number, {"a": "block"}),
            "10^400": replaced(tree, is_number, 10**400),
        }.items():
            if other != tree:
                yield name, b"\n".join([*rest, json.dumps(other).encode(), b""])
    if path.name == "config.yaml":
        yield "a key less", whole.replace(b"\nseed: 0", b"")
        yield "wrong type", whole.replace(b"checkpoint_every: 2", b"checkpoint_every: two")
        yield "alias of itself", whole + b"more: &a [*a]\n"


@pytest.fixture(scope="module")
def whole(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return agentrl.train(
        agentrl.load_config(None, *TINY, f"run.folder={folder}", "run.name=tiny"), quiet=True
    ).folder


def cases(run: Path) -> Iterator[tuple[str, str, str, bytes | None]]:
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or (name.startswith("checkpoints/") and not name.startswith(NEWEST)):
            continue
        for damage, content in [*damages(path), ("a folder", b"")]:
            for command in COMMANDS:  # a file that is not read is damaged in two ways only
                if matches(name, READS[command]) or damage in ("garbage", "a folder"):
                    yield command, name, damage, content


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def outcome(command: str, run: Path, name: str, damage: str, content: bytes | None) -> str:
    """`harmless` or `refused`, else what is wrong with it."""
    path = run / name
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    read = matches(name, READS[command])
    may_pass = any(
        fnmatch(command, one) and fnmatch(name, other) and (why in (damage, "*"))
        for one, other, why in HARMLESS
    )
    in_the_way = damage == "a folder" and matches(name, WRITES.get(command, ()))
    try:
        COMMANDS[command](run)
    except AgentRLError as error:
        if not (read or in_the_way):
            return f"refused for a file that it does not read: {error}"
        named = path.name in str(error) or path.parent.name in str(error)
        if not named and command != "config":  # of the caller's own file it may name the key alone
            return f"the message does not name the file: {error}"
        if (path.read_bytes() if path.is_file() else None) != (None if damage == "a folder" else content):
            return "refused, but changed"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "harmless" if may_pass or not (read or in_the_way) else "taken for whole"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_damaged_file_is_refused_by_name_or_does_no_harm(whole: Path, tmp_path: Path, stride: int) -> None:
    """Files x damages x commands; every 19th of them in the daily suite."""
    found, wrong = Counter[str](), []
    for index, (command, name, damage, content) in enumerate(list(cases(whole))[::stride]):
        run = tmp_path / str(index) / "tiny"
        shutil.copytree(whole, run)
        came = outcome(command, run, name, damage, content)
        found[came if came in ("harmless", "refused") else "wrong"] += 1
        if came not in ("harmless", "refused"):
            wrong.append(f"{command} {name} {damage}: {came}")
        shutil.rmtree(run)
    print(dict(found))
    assert wrong == []


def test_a_newer_run_is_refused_and_an_older_one_is_read(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(whole, run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["schema"] == 2
    (run / "manifest.json").write_text(json.dumps(manifest | {"schema": 3}))
    for command in ("resume", "report", "evaluate"):
        with pytest.raises(CheckpointError, match=r"newer agentrl \(schema 3; this version reads up to 2\)"):
            COMMANDS[command](run)
    del manifest["schema"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert open_run(run).config == open_run(whole).config


def test_an_older_checkpoint_that_a_kill_half_removed_stops_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(whole, run)
    shutil.rmtree(run / NEWEST)
    older = run / "checkpoints/train-000001"
    shutil.copytree(run / "checkpoints/train-000002", older)
    for name in ("progress.json", "hashes.json"):
        (older / name).unlink()
    agentrl.resume(run, quiet=True)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        path.name for path in sorted((whole / "checkpoints").iterdir())
    ]


def test_a_run_whose_folder_vanishes_ends_with_a_message(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = examples["hotcold"].HotCold.step

    def vanishing(self: Any, action: str) -> Any:
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) == 3:
            shutil.rmtree(tmp_path / "tiny")
        return step(self, action)

    monkeypatch.setattr(examples["hotcold"].HotCold, "step", vanishing)
    config = agentrl.load_config(None, *TINY, f"run.folder={tmp_path}", "run.name=tiny")
    with pytest.raises(CheckpointError, match="was removed"):
        agentrl.train(config, quiet=True)
    assert list(tmp_path.iterdir()) == []
