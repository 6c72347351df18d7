"""No text from outside steers a terminal, is markup, or is code of a page, wherever it is shown."""

import ast
import json
import re
import warnings
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer.testing import CliRunner, Result

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes
from agentrl.env import TextSpace, register
from agentrl.errors import AgentRLError
from agentrl.evaluation.report import write_report
from agentrl.evaluation.results_table import results_table
from agentrl.evaluation.watch import watch
from agentrl.rollout.play import ActionRequest
from agentrl.rollout.players import HumanPlayer
from agentrl.study.comparison import CURVES
from agentrl.study.tables import write_comparison
from agentrl.terminal import Terminal, echo, plain, plain_warnings, printable

PACKAGE = Path(agentrl.__file__).parent

ATTACKS = {
    "terminal": "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1m\x9d8;;\r\x08\u202e",
    "markup": "[/x][bold]b[/bold] [link=file:///]l[/] :bomb: $x_$ [red",
    "page": "</td></script><script>alert(1)</script><img src=x onerror='a()'>\" onload=\"b() --> ]]> {{ 7 }}",
}
ATTACK = " ".join(ATTACKS.values())
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


class Hostile(gymnasium.Env[str, str]):
    """Two steps; everything that it names is the attack."""

    observation_space = action_space = TextSpace()
    data = ATTACK

    def __init__(
        self, split: str = "train", max_steps: int = 2, fails: str = "", expert: bool = False
    ) -> None:
        self.splits: tuple[str, ...] = ("train", ATTACK)
        self.max_steps, self.left, self.fails, self._expert = max_steps, 0, fails, expert

    def tasks(self, split: str) -> list[str]:
        if split not in self.splits:
            raise AgentRLError(f"no split {split}: {ATTACK}")
        return [f"{split}/{number} {ATTACK}" for number in range(4)]

    def task_hash(self, task: str) -> str:
        if not task.endswith(ATTACK):
            raise AgentRLError(f"no task {task}: {ATTACK}")
        import hashlib

        return hashlib.sha256(task.encode()).hexdigest()

    def expert(self) -> str:
        return f"go {ATTACK}"

    def _info(self) -> dict[str, Any]:
        more = {"expert": self.expert()} if self._expert else {}
        return {
            "success": self.left == 0,
            "actions": [f"go {ATTACK}", f"stay {ATTACK}"],
            "task_type": ATTACK,
            "state_key": ATTACK,
            "tool": ATTACK,
            "tool_error": ATTACK,
            **more,
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.task_hash((options or {}).get("task", ATTACK))
        self.left = self.max_steps
        return f"begin {ATTACK}", self._info()

    def step(self, action: str) -> Any:
        if self.left <= 0:
            raise AgentRLError(ATTACK)
        self.left -= 1
        if self.fails == "raises":
            raise RuntimeError(ATTACK)
        if self.fails == "breaks":
            return f"said {ATTACK}", ATTACK, False, False, {}
        return f"said {ATTACK}", float(action.startswith("go")), self.left == 0, False, self._info()


register("terminal-tests/Hostile-v0", Hostile)
ENV = "terminal-tests/Hostile-v0"


def command(*words: str, typed: str | None = None) -> Result:
    """Run a command; a failure must be a message."""
    result = CliRunner().invoke(app, list(words), input=typed)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert not _CONTROLS.search(result.output), repr(result.output)
    return result


def literal(text: str) -> str:
    """As lines are broken to fit a terminal, without white space."""
    return re.sub(r"\s+", "", text)


MARKUP = literal(ATTACKS["markup"])


class _Page(HTMLParser):
    """Collects what a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(path: Path) -> str:
    """The text of a page in which nothing of the attack is code."""
    text = path.read_text(encoding="utf-8")
    assert not _CONTROLS.search(text)
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value and value.startswith("data:") for name, value in page.attributes if name == "src")
    return "".join(page.text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[agentrl.Run, str]:
    """A finished run in the hostile environment, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    words = [
        *("train", f"env.id={ENV}", f"run.folder={folder}", "run.name=hostile"),
        *("warm_start.steps=1", "warm_start.batch_size=2", "warm_start.demonstrations=2"),
        *("trainer.steps=1", "trainer.save_episodes_every=1", "rollout.groups_per_step=1"),
        *("rollout.group_size=2", "policy.tokenizer_episodes=2", "policy.hidden_size=32", "policy.heads=1"),
        *("policy.vocab_size=400", "evaluation.split=train", "evaluation.tasks=2"),
        "rollout.placement=inline",
    ]
    result = command(*words)
    assert result.exit_code == 0, result.output
    return agentrl.open_run(folder / "hostile"), result.output


def test_a_run_shows_what_an_environment_names_as_it_is_written(run: tuple[agentrl.Run, str]) -> None:
    found, output = run
    assert MARKUP in literal(output)
    assert ATTACKS["page"].split()[1] in output  # a terminal has no pages
    episodes = read_episodes(found.folder / "episodes" / "trained-greedy.parquet")
    assert {episode.task_type for episode in episodes} == {ATTACK}  # what is stored is what was said


def test_a_report_of_it_runs_and_loads_nothing(run: tuple[agentrl.Run, str]) -> None:
    text = check_page(run[0].folder / "report.html")
    assert ATTACKS["markup"] in text
    assert ATTACKS["page"] in text
    assert command("report", str(run[0].folder)).exit_code == 0


def test_an_evaluation_of_it_is_shown(run: tuple[agentrl.Run, str]) -> None:
    for policy in ("random", "expert", str(run[0].folder)):
        result = command("evaluate", "--policy", policy, "--env", ENV, "--split", ATTACK, "--tasks", "2")
        assert result.exit_code == 0, result.output
        assert MARKUP in literal(result.output)


@pytest.mark.parametrize("fails", ["raises", "breaks"])
def test_reasons_of_failures_are_shown(fails: str) -> None:
    result = command("evaluate", "--policy", "random", "--env", ENV, "--tasks", "2", f"fails={fails}")
    assert MARKUP in literal(result.output)
    assert f"aborted 2 x {'env_error' if fails == 'raises' else 'contract'}" in result.output
    assert MARKUP[:20] in literal(command("play", ENV, "--policy", "random", f"fails={fails}").output)


def test_an_episode_is_played_and_shown(run: tuple[agentrl.Run, str]) -> None:
    for policy in ("random", "expert", str(run[0].folder)):
        result = command("play", ENV, "--policy", policy)
        assert result.exit_code == 0, result.output
        assert MARKUP in literal(result.output)
    result = command("play", ENV, typed="1\n2\n")
    assert result.exit_code == 0, result.output
    assert MARKUP in literal(result.output)


@pytest.mark.parametrize(
    "words",
    [
        ["check-env", ENV],
        ["check-env", ATTACK],
        ["check-env", ENV, "fails=raises"],
        ["check-env", ENV, f"split={ATTACK}"],
        ["check-env", ENV, f"nothing={ATTACK!r}"],
        ["play", ENV, "--task", ATTACK],
        ["play", ENV, "--split", f"no {ATTACK}"],
        ["play", ATTACK],
        ["play", ENV, "--policy", ATTACK],
        ["evaluate", "--policy", ATTACK],
        ["evaluate", "--policy", "random", "--env", ATTACK],
        ["evaluate", "--policy", "random", "--env", ENV, "--split", f"no {ATTACK}"],
        ["evaluate", "--policy", "random", "--panel", ATTACK],
        ["evaluate", "--policy", "random", "--placement", ATTACK],
        ["train", f"run.name={json.dumps(ATTACK)}"],
        ["train", f"env.id={json.dumps(ATTACK)}"],
        ["train", f"env.split={json.dumps(ATTACK)}x", f"env.id={ENV}"],
        ["train", f"algorithm.name={json.dumps(ATTACK)}"],
        ["train", f"{ATTACK}=1"],
        ["train", ATTACK],
        ["train", "--resume", ATTACK],
        ["plan", f"policy.path={json.dumps(ATTACK)}"],
        ["config", f"env.id={json.dumps(ATTACK)}"],
        ["algorithms", ATTACK],
        ["report", ATTACK],
        ["new-env", ATTACK],
        ["--debug", "train", "--resume", ATTACK],
    ],
    ids=lambda words: " ".join(words)[:30].encode("unicode_escape").decode(),
)
def test_no_message_steers_the_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words).output.strip()


def test_a_run_of_any_name_is_shown(run: tuple[agentrl.Run, str], tmp_path: Path) -> None:
    named = tmp_path / "[red]x[\x1b[31m<b>"
    named.symlink_to(run[0].folder)
    assert command("evaluate", "--policy", str(named), "--tasks", "1").exit_code == 0
    assert command("report", str(named)).exit_code == 0
    assert command("train", "--resume", str(named), "seed=7").exit_code == 2


def _score(**more: Any) -> dict[str, Any]:
    rate = {"success_rate": 0.5, "interval": [0.1, 0.9], "episodes": 2}
    return {**rate, "by_task_type": {ATTACK: rate}, "aborted": 1, "aborted_reasons": {ATTACK: 1}, **more}


@pytest.mark.parametrize("types", [1, 9])
def test_anybodys_console_shows_a_table_of_results(types: int) -> None:
    rate = {"success_rate": 0.5, "interval": [0.1, 0.9], "episodes": 2}
    score = _score(by_task_type={f"{number}{ATTACK}": rate for number in range(types)}, data=ATTACK)
    check = {ATTACK: {"new_goal": rate, "old_goal": rate}}
    summary = {"policies": {ATTACK: {ATTACK: score}}, "instruction_check": check}
    out = StringIO()
    Console(file=out, width=2000).print(results_table(summary))
    assert not _CONTROLS.search(out.getvalue())
    assert ATTACKS["markup"].replace("_", " ") in out.getvalue().replace("_", " ")


def test_a_report_of_hostile_files_runs_and_loads_nothing(tmp_path: Path) -> None:
    entropy = {"by_turn": [0.5, 0.4], "token": 0.1, "turn": 0.1, "trajectory": 0.1}
    score = _score(entropy=entropy, data=ATTACK, panel_hash=ATTACK, mean_turns=1.0, mean_return=0.5)
    policies = {name: {"sampled": score, "greedy": score} for name in ("cloned", "trained", ATTACK)}
    facts = {"env": ATTACK, "data": ATTACK, ATTACK: {ATTACK: [ATTACK]}, "policies": policies}
    (tmp_path / "summary.json").write_text(json.dumps(facts))
    (tmp_path / "manifest.json").write_text(json.dumps({ATTACK: ATTACK}))
    (tmp_path / "config.yaml").write_text(f"# {ATTACKS['page']} {ATTACKS['markup']}")
    row = {"stage": "train", "step": 1, "success": 0.5, "entropy/token": 0.1, f"learner/{ATTACK}": 0.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 2}) + "\n")
    text = check_page(write_report(tmp_path))
    assert text.count(ATTACKS["page"]) >= 5


def test_figures_are_images_whatever_their_labels() -> None:
    import base64
    from xml.etree import ElementTree

    from agentrl.evaluation.figures import draw_success

    uri = draw_success({ATTACK: {"greedy": _score()}})
    image = ElementTree.fromstring(base64.b64decode(uri.partition(",")[2]))
    assert not [each for each in image.iter() if each.tag.endswith("script")]


def test_a_comparison_of_hostile_runs_is_text_everywhere(tmp_path: Path) -> None:
    score = {"value": 0.5, "interval": [0.1, 0.9], "by_seed": {"0": 0.5}}
    run = {
        **dict.fromkeys(("episodes", "updates", "replay_updates", "cpu_seconds"), 1),
        "aborted": {"training": 0},
        "curves": {key: {"step": [1.0], "value": [0.5]} for key in CURVES},
    }
    method = {"runs": {"0": run}, "greedy": score, "sampled": score}
    results = {
        "methods": {"plain": method, ATTACK: method},
        "baseline": "plain",
        "clone": ATTACK,
        "warnings": [ATTACK],
        "failed": {"seed-0/plain": ATTACK},
        "caption": [ATTACK],
    }
    out = StringIO()
    write_comparison(tmp_path, results, Console(file=out, width=400))
    assert not _CONTROLS.search(out.getvalue())
    assert ATTACKS["markup"] in out.getvalue()
    table = (tmp_path / "table.md").read_text()
    assert not _CONTROLS.search(table)
    assert "<script" not in table
    assert "<img" not in table


def test_a_person_who_plays_on_a_console_of_their_own_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    out = StringIO()
    console = Console(file=out, width=2000, force_terminal=False)
    monkeypatch.setattr("builtins.input", lambda prompt="": "1")
    watch(console, ENV)
    assert not _CONTROLS.search(out.getvalue())
    assert ATTACKS["markup"] in out.getvalue()
    assert isinstance(HumanPlayer(lambda request: ""), HumanPlayer)
    assert ActionRequest("e", 0, "", None, {}, 0).actions is None


def test_what_is_printable_stays() -> None:
    text = "a\tb\nc é 漢 👩‍🔬 ä [x] \u00a0"
    assert printable(text) == text
    assert printable("a\r\nb") == "a\nb"
    assert printable("\x00\x1b\x7f\x85\x9b\r\u2028\ud800\u2066") == "�" * 9


def test_a_terminal_takes_text_for_text() -> None:
    out = StringIO()
    terminal = Terminal(file=out, width=400)
    table = Table(title=f"title {ATTACK}")
    table.add_column(f"column {ATTACK}")
    table.add_row(f"cell {ATTACK}")
    with Progress(console=terminal, disable=True):
        for each in (table, ATTACK, plain(ATTACK, "bold red")):
            terminal.print(each)
    assert not _CONTROLS.search(out.getvalue())
    assert out.getvalue().count(ATTACKS["markup"]) == 5


def test_a_style_is_for_terminals_and_a_warning_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    echo(ATTACK, err=True, style="bold red")
    with plain_warnings(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(ATTACK, RuntimeWarning, stacklevel=1)
    told = capsys.readouterr().err
    assert not _CONTROLS.search(told)
    assert told.count(ATTACKS["markup"]) >= 2


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_is_printed_past_the_one_door(path: Path) -> None:
    if path.name == "terminal.py" or "sandbox" in path.parts:
        return
    doors = {"print", "Console", "Text", "secho", "print_exc", "from_markup"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in doors, f"{path}:{node.lineno}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", "")
            assert (owner, node.func.attr) not in {
                ("typer", "echo"),
                ("typer", "secho"),
                ("traceback", "print_exc"),
            }, f"{path}:{node.lineno}"
