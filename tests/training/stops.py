"""Stop a tiny run at moments spread over its life, resume it, and compare its folder with one never stopped.

    python stops.py FOLDER_OF_HOTCOLD FOLDER COUNT SEED

Prints one JSON object: stops by signal, how many of them came before the end, and what differed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import agentrl
import agentrl.env
from agentrl.data.storage import read_episodes
from agentrl.evaluation import figures

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=2",
    "evaluation.every=2",
    "evaluation.instruction_check=false",
    "warm_start.steps=3",
    "warm_start.batch_size=2",
    "warm_start.demonstrations=4",
    "trainer.steps=5",
    "trainer.checkpoint_every=2",
    "trainer.save_episodes_every=1",
    "trainer.threads=1",
    "policy.hidden_size=16",
    "policy.layers=1",
    "policy.heads=1",
    "policy.max_context=256",
    "policy.tokenizer_episodes=2",
    "rollout.groups_per_step=2",
    "rollout.group_size=3",
    "rollout.placement=inline",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# What may differ: the clock, and what is written of it.
CLOCKS = {"clocks.json", "report.html"}


def in_child(work: Callable[[], None]) -> int:
    """Do the work in a process of its own; what `waitpid` says of its end."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 3
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def begin(parent: Path) -> None:
    agentrl.train(agentrl.load_config(None, *TINY, f"run.folder={parent}", "run.name=tiny"), quiet=True)


def go_on(parent: Path) -> None:
    if (parent / "tiny").exists():
        agentrl.resume(parent / "tiny", quiet=True)
    else:
        begin(parent)


def stop_after(seconds: float, number: int, work: Callable[[], None]) -> None:
    """Have the process signalled after so much of its own computing, whatever else the machine does."""
    signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-4))
    work()


def content(path: Path) -> Any:
    """What is compared of a file."""
    if path.name in CLOCKS:
        return None
    if path.name == "summary.json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "times"}
    if path.name == "config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("  folder:")]
    if path.name == "hashes.json":  # equal states may be pickled in other bytes
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "learner.pt"}
    if path.name == "learner.pt":
        return plain(torch.load(path, weights_only=True))
    return read_episodes(path) if path.suffix == ".parquet" else path.read_bytes()


def plain(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return (tree.dtype, tree.tolist())
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(each) for each in tree] if isinstance(tree, list | tuple) else tree


def files(run: Path) -> dict[str, Any]:
    return {str(path.relative_to(run)): content(path) for path in sorted(run.rglob("*")) if path.is_file()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        name
        for name in sorted({*one, *other})
        if name not in one or name not in other or one[name] != other[name]
    ]


def by_stage(path: Path) -> tuple[bool, str]:
    return path.name.startswith("train"), path.name


def main(hotcold: str, folder: str, count: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("learning_curve", "entropy_over_steps", "entropy_by_turn", "signals", "success"):
        setattr(figures, f"draw_{name}", lambda *_: "")  # or most stops would come while pictures are drawn
    sys.path.insert(0, hotcold)
    import hotcold as example

    agentrl.env.load_plugins()
    example.plug_in()
    parent, draw = Path(folder), random.Random(seed)

    begin(parent / "warm")  # loads what is loaded once, so that the moments fall into the run

    def measured() -> None:
        began = time.process_time()
        begin(parent / "unbroken")
        (parent / "seconds").write_text(str(time.process_time() - began))

    assert in_child(measured) == 0
    whole = float((parent / "seconds").read_text())
    wanted = files(parent / "unbroken" / "tiny")
    stopped, differ, places = Counter[str](), dict[str, Any](), Counter[str]()
    for index in range(count):
        number, at = SIGNALS[index % len(SIGNALS)], (index + draw.random()) / count * whole
        place = parent / f"stop-{index}"
        ended = in_child(partial(stop_after, at, number, partial(begin, place)))
        stopped[f"{number.name} {'stopped' if ended else 'came after the end'}"] += 1
        saved = sorted((place / "tiny" / "checkpoints").glob("*-*"), key=by_stage)
        finished = (place / "tiny" / "summary.json").exists()
        places["summary" if finished else saved[-1].name if saved else "no checkpoint"] += 1
        resumed = in_child(partial(go_on, place))
        wrong = differences(wanted, files(place / "tiny")) if resumed == 0 else [f"exit code {resumed}"]
        if ended not in (0, 1, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            wrong.append(f"the stop ended with {ended}")
        if wrong:
            differ[f"{index}: {number.name} at {at:.3f} of {whole:.3f} s"] = wrong
        else:
            shutil.rmtree(place, ignore_errors=True)
    print(json.dumps({"stopped": stopped, "newest checkpoint": places, "differ": differ}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
