import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentrl.run.logger import RunLogger, read_metrics


def rows(*steps: int, stage: str = "train") -> list[dict[str, Any]]:
    return [{"stage": stage, "step": step, f"{stage}/learner/loss": step / 10} for step in steps]


def run_logger(folder: Path, *, terminal: bool = False, pause: float = 0.0) -> tuple[RunLogger, io.StringIO]:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    return RunLogger(folder, console=console, seconds_between_lines=pause), shown


def write(folder: Path, *written: dict[str, Any]) -> None:
    with RunLogger(folder, quiet=True) as logger:
        for row in written:
            logger.write(row)


def test_rows_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with RunLogger(tmp_path, quiet=True) as logger:
        logger.write({"step": 1, "loss": 0.5})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_a_second_logbook_appends(tmp_path: Path) -> None:
    write(tmp_path, *rows(1, 2))
    write(tmp_path, *rows(3))
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(1, 2, 3)


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "a": math.nan, "b": math.inf, "c": None, "d": "text", "e": 2})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": None,
        "d": "text",
        "e": 2,
    }


def test_the_clock_is_not_in_the_file(tmp_path: Path) -> None:
    with RunLogger(tmp_path, quiet=True) as logger:
        logger.write({"stage": "train", "step": 1, "train/rollout/reply_tokens": 10}, seconds=0.5)
    assert read_metrics(logger.path) == [{"stage": "train", "step": 1, "train/rollout/reply_tokens": 10}]


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [
        ("train", 2, rows(1, 2, stage="warm_start") + rows(1, 2)),
        ("train", 9, rows(1, 2, stage="warm_start") + rows(1, 2, 3)),
        ("train", 0, rows(1, 2, stage="warm_start")),
        ("warm_start", 2, rows(1, 2, stage="warm_start")),
        ("warm_start", 1, rows(1, stage="warm_start")),
        ("start", 0, []),
    ],
)
def test_truncating_forgets_what_came_after_the_resumed_step(
    tmp_path: Path, stage: str, step: int, kept: list[dict[str, Any]]
) -> None:
    write(tmp_path, *rows(1, 2, stage="warm_start"), *rows(1, 2, 3))
    with RunLogger(tmp_path, quiet=True) as logger:
        logger.truncate(stage, step)
        assert read_metrics(logger.path) == kept
        logger.write({"step": 99})
    assert read_metrics(logger.path) == [*kept, {"step": 99}]


def test_truncating_leaves_the_kept_bytes_alone(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"stage": "train", "step": 1, "train/learner/loss": 0.1 + 0.2, "train/algorithm/text": "é"},
        *rows(2),
    )
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    RunLogger(tmp_path).truncate("train", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == first + "\n"


def test_a_line_that_was_cut_off_ends_the_rows(tmp_path: Path) -> None:
    write(tmp_path, *rows(1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "st')
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(1, 2)
    with RunLogger(tmp_path, quiet=True) as logger:
        logger.truncate("train", 2)
        logger.write(rows(3)[0])
    assert read_metrics(logger.path) == rows(1, 2, 3)


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    logger, shown = run_logger(tmp_path)
    row = {
        "stage": "train",
        "train/rollout/success_rate": 0.25,
        "train/rollout/reward_mean": 0.5,
        "train/rollout/entropy/token": 0.125,
        "train/rollout/reply_tokens": 3000,
        "train/rollout/aborted_rate": 0.0,
    }
    with logger, logger.stage("training", total=4, done=2):
        logger.write(row | {"step": 3}, seconds=2.0)
        logger.write(row | {"step": 4, "train/rollout/aborted_rate": 0.1}, seconds=2.0)
    first, third, fourth = shown.getvalue().splitlines()
    assert first == "training 2/4"
    assert third.startswith(
        "training 3/4 · success 0.250 · return 0.500 · entropy 0.125 · 1,500 tokens/s · 0:0"
    )
    assert third.endswith(" left")
    assert "aborted 10.0%" in fourth
    assert "\x1b" not in shown.getvalue()


def test_plain_lines_come_seldom_but_always_at_the_end(tmp_path: Path) -> None:
    logger, shown = run_logger(tmp_path, pause=60)
    with logger, logger.stage("training", total=100):
        for step in range(100):
            logger.write({"stage": "train", "step": step + 1, "train/rollout/success_rate": 0.5})
    assert shown.getvalue().splitlines() == ["training 0/100", "training 100/100 · success 0.500"]


def test_a_stage_inside_a_stage_gives_the_outer_one_back(tmp_path: Path) -> None:
    for terminal in (False, True):
        logger, shown = run_logger(tmp_path, terminal=terminal)
        with logger, logger.stage("training", total=9):
            with logger.stage("evaluating"):
                logger.advance(5)
            logger.write({"stage": "train", "step": 3, "train/rollout/success_rate": 0.5})
        assert terminal or "evaluating 5" in shown.getvalue()
        assert "training 3/9 · success 0.500" in shown.getvalue()


def test_a_terminal_gets_a_bar_and_its_cursor_back(tmp_path: Path) -> None:
    logger, shown = run_logger(tmp_path, terminal=True)

    def interrupted() -> None:
        with logger, logger.stage("training", total=2):
            logger.write({"step": 1, "success": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "━" in shown.getvalue()
    assert shown.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_quiet_logbook_shows_nothing_and_writes_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path, quiet=True) as logger, logger.stage("training", total=1):
        logger.write({"step": 1})
        logger.say("hello")
        logger.show("hello")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert len(read_metrics(logger.path)) == 1


def test_text_from_elsewhere_is_not_markup(tmp_path: Path) -> None:
    logger, shown = run_logger(tmp_path)
    logger.say("[bold]x[/bold] [/]")
    assert shown.getvalue() == "[bold]x[/bold] [/]\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, RunLogger(tmp_path, quiet=True) as logger:
        logger.write({"step": 1})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
