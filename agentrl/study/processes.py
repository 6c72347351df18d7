"""Processes of a study's runs: start them, wait for them and stop them."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agentrl.run.records import read_summary
from agentrl.run.signals import Interruption, RunInterrupted
from agentrl.study.runs import StudyRun
from agentrl.terminal import plain

_POLL_SECONDS = 0.1


class RunProcesses:
    """Processes of the runs of a study."""

    def __init__(
        self, runs: Sequence[StudyRun], jobs: int, lock: int, interruption: Interruption, console: Console
    ) -> None:
        self._runs, self._jobs, self._lock = runs, jobs, lock
        self._interruption, self._console = interruption, console
        self._running: dict[StudyRun, subprocess.Popen[bytes]] = {}
        self._failed: dict[StudyRun, str] = {}
        self._done = 0

    def finish(self, phase: str) -> dict[str, str]:
        """Finish all runs that can be finished; return the failed ones with the reasons."""
        waiting = [run for run in self._runs if not run.finished]
        self._done = len(self._runs) - len(waiting)
        self._say(
            f"{phase}: {len(self._runs)} runs, {self._done} of them already finished; {self._jobs} at a time"
        )
        try:
            while waiting or self._running:
                waiting = [run for run in waiting if not self._start_or_fail(run)]
                time.sleep(_POLL_SECONDS)
                for run in [run for run, process in self._running.items() if process.poll() is not None]:
                    self._finish_run(run, self._running.pop(run).returncode)
        except KeyboardInterrupt as interrupt:
            self._stop()
            raise RunInterrupted(
                f"stopped with {self._done} of {len(self._runs)} runs finished; the same command continues"
            ) from interrupt
        finally:
            self._stop()
        return {f"seed-{run.config.seed}/{run.name}": why for run, why in self._failed.items()}

    def _start_or_fail(self, run: StudyRun) -> bool:
        """Start the run if a slot is free and its clone has finished; fail it if its clone failed."""
        if run.clone in self._failed:
            self._fail(run, "its clone failed")
            return True
        if len(self._running) >= self._jobs or not (run.clone is None or run.clone.finished):
            return False
        with self._interruption.shield():  # a stop must not come before the process is registered
            self._running[run] = start(run, self._lock)
        return True

    def _finish_run(self, run: StudyRun, code: int) -> None:
        if code or not run.finished:
            self._fail(run, f"exit code {code}: {_last_error(run.log)} (see {run.log})")
            return
        self._done += 1
        trained = read_summary(run.folder)["policies"]["trained"]
        rates = ", ".join(f"{decoding} {_format_rate(score)}" for decoding, score in trained.items())
        self._say(f"{self._done}/{len(self._runs)} {run.label}: success {rates}")

    def _fail(self, run: StudyRun, why: str) -> None:
        self._failed[run] = why
        self._say(f"failed: {run.label}: {why}")

    def _stop(self) -> None:
        """Ask every process to save its state, and wait until all have ended."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _say(self, line: str) -> None:
        self._console.print(plain(line), highlight=False, soft_wrap=True)


def start(run: StudyRun, lock: int) -> "subprocess.Popen[bytes]":
    """Start a run in a new process, which holds the open file `lock` as long as it is alive."""
    with run.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from agentrl.cli import main; main()", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the study, which stops its runs itself
            pass_fds=(lock,),
        )


def _last_error(log: Path) -> str:
    """Return the error message that ends a log, or else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    _, found, words = f"\n{text}".rpartition("\nerror: ")
    return words if found else text.rpartition("\n")[2]


def _format_rate(score: Mapping[str, Any]) -> str:
    rate = score["success_rate"]
    return "unknown (all aborted)" if rate is None else f"{100 * rate:.1f} %"
