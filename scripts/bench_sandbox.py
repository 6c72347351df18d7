"""Measure the sandbox: first executions (session, run, close) and warm ones per second, by isolation.

Rivals, in the same run and interleaved: a cold `python -I -S -c` per execution, and `exec` in this process,
which is the upper bound and no sandbox. Medians of `--repeats` rounds: python scripts/bench_sandbox.py
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from agentrl.env.sandbox import LEVELS, Sandbox, Session, probe

CODE = "total = sum(n * n for n in range(100))\nprint(total)"
ANSWER = "328350\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=100, help="first executions per round")
    parser.add_argument("--warm", type=int, default=2000, help="warm executions per round")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    reasons = probe()
    levels = [level for level in LEVELS if reasons[level] is None]
    rates: dict[str, list[float]] = {}

    def measure(name: str, count: int, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        for _ in range(count):
            work()
        rates.setdefault(name, []).append(count / (time.perf_counter() - started))

    with contextlib.ExitStack() as stack:
        sandboxes = {level: stack.enter_context(Sandbox(isolation=level)) for level in levels}
        sessions = {level: stack.enter_context(sandboxes[level].session()) for level in levels}
        for _ in range(arguments.repeats):
            measure("cold python -I -S -c", max(1, arguments.first // 5), cold)
            for level in levels:
                measure(f"first, {level}", arguments.first, lambda box=sandboxes[level]: first(box))
                measure(f"warm, {level}", arguments.warm, lambda session=sessions[level]: warm(session))
            measure("exec in this process", arguments.warm, in_process)

    print(
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; wall-clock rates, median of rounds"
    )
    floor = statistics.median(rates["cold python -I -S -c"])
    for name, values in rates.items():
        rate = statistics.median(values)
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"  {name:24}{rate:10,.0f} /s  ({spread:>16})  {rate / floor:8,.1f} x cold")
    for level in LEVELS:
        if reasons[level] is not None:
            print(f"  {level}: not measured: {reasons[level]}")


def cold() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CODE], capture_output=True, text=True, check=True
    )
    assert done.stdout == ANSWER


def first(sandbox: Sandbox) -> None:
    with sandbox.session() as session:
        warm(session)


def warm(session: Session) -> None:
    assert session.run(CODE).output == ANSWER


def in_process() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(CODE, "<code>", "exec"), {})
    assert output.getvalue() == ANSWER


if __name__ == "__main__":
    main()
