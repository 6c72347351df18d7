import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentrl.data.storage import write_episodes
from agentrl.data.trajectory import Episode, StopReason, Turn
from agentrl.errors import CheckpointError
from agentrl.evaluation.figures import draw_signals, draw_success, moving_mean
from agentrl.evaluation.report import write_report
from agentrl.evaluation.results_table import results_table
from agentrl.evaluation.statistics import wilson

EVIL = "<script>alert(1)</script> & $mug_1$ \x1b[31m"


def rate(wins: int, episodes: int) -> dict[str, Any]:
    return {
        "success_rate": wins / episodes if episodes else None,
        "interval": list(wilson(wins, episodes)),
        "episodes": episodes,
    }


def score(wins: int, episodes: int = 200, types: int = 2, **more: Any) -> dict[str, Any]:
    kinds = {f"task_kind_{index}": rate(wins // types, episodes // types) for index in range(types)}
    return rate(wins, episodes) | {
        "by_task_type": kinds,
        "aborted": 0,
        "aborted_reasons": {},
        "mean_return": wins / episodes,
        "mean_turns": 7.25,
        "entropy": {"token": 0.5, "turn": 0.5, "trajectory": 0.5, "by_turn": [0.8, 0.4]},
        "panel_hash": "0123456789abcdef",
        "data": "generated",
        **more,
    }


def summary(types: int = 2, **trained: dict[str, Any]) -> dict[str, Any]:
    return {
        "env": f"tests/{EVIL}",
        "policies": {
            "random": {"sampled": score(2, types=types)},
            "cloned": {"greedy": score(80, types=types), "sampled": score(40, types=types)},
            "step-000002": {"sampled": score(66, types=types)},
            "trained": trained or {"greedy": score(84, types=types), "sampled": score(100, types=types)},
        },
        "instruction_check": {"sampled": {"new_goal": rate(90, 180), "old_goal": rate(9, 180), "aborted": 0}},
        "times": {"wall": 201.25},
    }


def episode(index: int, success: bool) -> Episode:
    turns = tuple(
        Turn(
            f"turn {index}.{turn} {EVIL}",
            f"go {EVIL}",
            action_ids=(1, 2),
            entropies=(0.25, 0.0),
            allowed=((1, 2), (2,)),
        )
        for turn in range(2)
    )
    stop = StopReason.TERMINATED if success else StopReason.TRUNCATED
    return Episode(
        f"e{index}", "x", f"task-{index}", 0, turns, stop, success, task_type=EVIL, final_observation=EVIL
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    (folder / "episodes").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary()))
    (folder / "manifest.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "git": EVIL}))
    (folder / "config.yaml").write_text(f"seed: 0\n# {EVIL[:20]}\n")
    rows = [{"stage": "warm_start", "step": 1, "loss": 1.0}]
    rows += [
        {
            "stage": "train",
            "step": step,
            "train/rollout/success_rate": step / 9,
            "train/rollout/entropy/token": 0.5,
        }
        for step in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_episodes(folder / "episodes/step-000008.parquet", [episode(50, True), episode(51, False)])
    write_episodes(
        folder / "episodes/trained-sampled.parquet",
        [
            episode(0, True),
            episode(1, True),
            episode(2, True),
            episode(3, False),
            episode(4, False),
            episode(5, False),
        ],
    )
    return folder


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def page_of(run: Path) -> _Page:
    return _Page(write_report(run).read_text(encoding="utf-8"))


def terminal(content: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(results_table(content))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_report_has_a_dark_scheme_for_every_colour_and_figure(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    light, _, dark = html.partition("@media (prefers-color-scheme: dark)")
    colours = set(re.findall(r"(--[a-z-]+): #", light))
    assert len(colours) >= 9
    assert set(re.findall(r"(--[a-z-]+): #", dark)) == colours
    rules = light[light.index("<style>") :]
    assert re.findall(r"^(?!  :root|    --).*#[0-9a-f]{3,6}", rules, re.M) == []  # each colour has a name
    assert re.search(r"img \{ filter: invert", dark)
    figures = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    assert len(figures) == 4
    for figure in figures:
        assert "#ffffff" not in base64.b64decode(figure).decode()  # a white ground would stay one


def test_headers_break_between_words_alone(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    (rule,) = re.findall(r"^  th \{(.*)\}$", html, re.M)
    assert "overflow-wrap: normal" in rule
    assert "<th>task kind 0</th><th>task kind 1</th>" in html


def test_a_report_needs_nothing_but_itself(run: Path) -> None:
    page = page_of(run)
    links = [value or "" for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert len(links) == 4
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert (
        "meta",
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        },
    ) in page.tags


def test_what_a_policy_or_environment_says_is_text_and_never_markup(run: Path) -> None:
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script> & $mug_1$" in page.text


def test_a_report_tells_the_story_in_numbers(run: Path) -> None:
    text = re.sub(r"\s+", " ", page_of(run).text)
    assert (
        "Sampled: the interval of the trained policy lies entirely above that of the cloned policy." in text
    )
    assert (
        "Greedy: the intervals overlap, so this panel does not separate the trained from the cloned policy."
        in text
    )
    assert "data: generated" in text
    assert "50.0 [43.1, 56.9]" in text  # 100 of 200
    assert "the panel's goal, which it was not given 5.0 % [2.7, 9.2] 180" in text
    assert "torch 2.13.0" in text
    assert "wall 201.25" in text


def test_two_successes_and_two_failures_of_the_trained_policy_are_shown_with_their_entropy(run: Path) -> None:
    page = page_of(run)
    assert re.findall(r"task-\d+", page.text) == ["task-0", "task-1", "task-3", "task-4"]
    assert "From trained-sampled.parquet." in page.text
    assert page.text.count("0.250") == 4 * 3  # of each episode and its two turns; the forced token is in none
    shades = [attrs["style"] for _, attrs in page.tags if "rgba(37" in (attrs.get("style") or "")]
    assert shades == ["background: rgba(37, 99, 235, 0.450)"] * 8


def test_points_of_the_learning_curve_are_not_rows_of_the_table(run: Path) -> None:
    assert "step-000002" not in page_of(run).text
    assert "step-000002" not in terminal(summary())


def test_an_unfinished_run_has_a_report_of_what_there_is(run: Path) -> None:
    for name in ("summary.json", "manifest.json"):
        (run / name).unlink()
    for path in (run / "episodes").iterdir():
        path.unlink()
    page = page_of(run)
    assert "Learning curve" in page.text
    assert "Episodes" not in page.text
    empty = run.parent / "empty"
    empty.mkdir()
    assert "Run details" in page_of(empty).text


def test_aborted_episodes_are_counted_with_their_reasons(run: Path) -> None:
    aborted = score(50, 190, aborted=10, aborted_reasons={"env_error: ValueError: x": 10})
    (run / "summary.json").write_text(json.dumps(summary(sampled=aborted)))
    assert "10 of 200 (10 x env_error: ValueError: x)" in page_of(run).text


def test_a_panel_of_aborted_episodes_has_a_report_without_a_rate(run: Path) -> None:
    (run / "summary.json").write_text(
        json.dumps(summary(sampled=rate(0, 0) | {"by_task_type": {}, "aborted": 9}))
    )
    assert "–" in page_of(run).text
    assert "–" in terminal(json.loads((run / "summary.json").read_text()))


def test_a_damaged_summary_is_named(run: Path) -> None:
    (run / "summary.json").write_text('{"policies": ')
    with pytest.raises(CheckpointError, match=r"summary\.json: damaged, not JSON"):
        write_report(run)


def test_a_damaged_file_of_episodes_is_passed_over(run: Path) -> None:
    (run / "episodes/trained-sampled.parquet").write_bytes(b"PAR1 no")
    assert "From step-000008.parquet." in page_of(run).text


def test_a_full_disk_leaves_the_older_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_the_table_has_a_row_per_policy_and_decoding() -> None:
    lines = [
        line.split() for line in terminal(summary()).splitlines() if "sampled " in line or "greedy " in line
    ]
    assert [line[:4] for line in lines[:5]] == [
        ["random", "sampled", "1.0", "[0.3,"],
        ["cloned", "greedy", "40.0", "[33.5,"],
        ["sampled", "20.0", "[15.0,", "26.1]"],
        ["trained", "greedy", "42.0", "[35.4,"],
        ["sampled", "50.0", "[43.1,", "56.9]"],
    ]
    assert "panel 0123456789ab, data: generated" in terminal(summary())


def test_six_task_types_fit_a_narrow_terminal() -> None:
    shown = terminal(summary(types=6), width=80)
    assert "…" not in shown
    assert shown.count("task") == 6


def test_names_with_mathematics_in_them_can_be_drawn() -> None:
    assert draw_success({"$\\frac{": {"greedy": rate(1, 2)}, "_hidden": {"sampled": rate(0, 0)}}).startswith(
        "data:"
    )


def test_a_moving_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert moving_mean([0.0, 3.0, 6.0, 9.0], window=3) == [1.5, 3.0, 6.0, 7.5]
    assert moving_mean([], window=3) == []


def drawn(uri: str) -> str:
    return base64.b64decode(uri.split(",", 1)[1]).decode()


def test_every_signal_that_moves_is_drawn_and_named() -> None:
    rows = [
        {
            "step": step,
            "train/rollout/success_rate": 0.1,
            "train/learner/clip_ratio": step / 10,
            "train/algorithm/constant": 1.0,
            "train/rollout/branches/restored": 3 - step,
            "train/rollout/staleness/mean": step / 2,
        }
        for step in range(3)
    ]
    picture = draw_signals(rows)
    assert picture is not None
    assert "learner/clip_ratio" in drawn(picture)
    assert "rollout/branches/restored" in drawn(picture)
    assert "rollout/staleness/mean" in drawn(picture)
    assert "constant" not in drawn(picture)
    assert draw_signals([{"step": 1, "train/rollout/success_rate": 0.1}]) is None


def test_the_waiting_times_of_an_async_run_are_reported(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"stage": "train", "step": step, "train/rollout/turns_mean": step}) + "\n"
            for step in (1, 2)
        )
    )
    assert "the learner waited" not in write_report(run).read_text()
    summary = json.loads((run / "summary.json").read_text())
    summary["times"] = {"learning.waited.wall": 12.3, "rollout.waited.wall": 4.5}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "the learner waited 12 s for episodes" in write_report(run).read_text()


def test_turns_and_task_types_share_a_panel_and_none_of_it_crowds_a_signal_out() -> None:
    turns = {f"train/algorithm/entropy/turn/{turn:02d}": turn for turn in range(50)}
    rows = [{"step": 1, **dict.fromkeys(turns, 0.5)}, {"step": 2, **turns}]
    for step, row in enumerate(rows):
        row |= {
            "train/rollout/success_rate/heat": step,
            "train/rollout/success_rate/cool": step,
            "train/algorithm/entropy_band/low": step,
        }
    titles = drawn(draw_signals(rows) or "")
    assert "algorithm/entropy/turn/*" in titles
    assert "rollout/success_rate/*" in titles
    assert "algorithm/entropy_band/low" in titles
    assert "entropy/turn/07" not in titles
    assert all(label in titles for label in ("heat", "cool", "00", "49"))
