"""`check_text_env` accepts a correct environment and pins every fault to the one claim that it breaks."""

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from text_worlds import Corridor

from agentrl.env import ContractReport, check_text_env
from agentrl.env.contract import trials
from agentrl.env.contract.checks import CHECKS
from agentrl.env.contract.probe import running_processes
from agentrl.errors import ConfigError, EnvironmentContractError, MissingDependencyError

NAMES = [name for name, _ in CHECKS]


def statuses(report: ContractReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def failed(report: ContractReport) -> list[str]:
    return [check.name for check in report.failed]


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trials, "PATIENCE", 0.1)
    before = running_processes()
    yield
    for process in running_processes() - before:
        process.kill()
        process.wait()


def test_a_correct_environment_passes_every_check() -> None:
    report = check_text_env(Corridor)
    assert statuses(report) == dict.fromkeys(NAMES, "passed"), str(report)
    assert (report.passed, report.env) == (True, "Corridor")
    assert (report.determinism, report.proven, report.thread_safe) == ("episode", "episode", True)
    assert report.declares == ("snapshot", "expert", "data: generated")
    assert report.splits == {"train": 20, "test": 6}
    assert report.measured.keys() == {"timing", "sizes"}
    report.raise_if_failed()


def test_what_an_environment_does_not_declare_is_skipped() -> None:
    class Bare(Corridor):
        snapshot = restore = expert = None  # type: ignore[assignment]
        thread_safe = False

        def info(self) -> dict[str, Any]:
            return {"success": self.won}

    report = check_text_env(lambda: Bare())
    assert [name for name, status in statuses(report).items() if status == "skipped"] == [
        "admissible actions",
        "snapshots",
        "expert",
        "threads",
    ]
    assert report.passed


def test_an_environment_behind_a_wrapper_and_the_registry_passes_under_its_id() -> None:
    gymnasium.register("test/Corridor-v0", Corridor, order_enforce=False, disable_env_checker=True)
    try:
        report = check_text_env(partial(gymnasium.make, "test/Corridor-v0"))
    finally:
        del gymnasium.registry["test/Corridor-v0"]
    assert report.passed, str(report)
    assert report.env == "test/Corridor-v0"


def test_the_report_reads_as_a_table_and_raises_with_every_fault() -> None:
    report = check_text_env(BrokenClose)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[0] == "BrokenClose breaks the contract: 21 passed, 1 failed"
    assert lines[1:5] == [
        "determinism episode declared, episode proven",
        "thread safe declared",
        "declares snapshot, expert, data: generated",
        "tasks 20 train, 6 test",
    ]
    begins = ("timing construct ", "reset ", "step ", "sizes observation ", "info ")
    assert [line.startswith(begin) for line, begin in zip(lines[5:10], begins, strict=True)] == [True] * 5
    assert "close failed raised RuntimeError: closed twice" in lines
    assert "processes passed none started" in lines
    with pytest.raises(
        EnvironmentContractError, match=r"BrokenClose breaks .* close: raised RuntimeError: closed twice"
    ):
        report.raise_if_failed()


def test_an_interrupt_is_not_taken_for_a_fault() -> None:
    class Interrupted(Corridor):
        def step(self, action: str) -> Any:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        check_text_env(Interrupted)


def test_what_an_environment_raises_to_end_the_program_is_a_fault() -> None:
    class Leaving(Corridor):
        def step(self, action: str) -> Any:
            raise SystemExit(0)

    failed = [check for check in check_text_env(Leaving).checks if check.status == "failed"]
    assert any("SystemExit: 0" in check.detail for check in failed)

    def unmade() -> Corridor:
        raise SystemExit(0)

    with pytest.raises(EnvironmentContractError, match="constructor raised SystemExit: 0"):
        check_text_env(unmade)


def test_an_environment_that_cannot_be_made_is_no_fault_of_its_contract() -> None:
    with pytest.raises(ConfigError, match="max_steps is 0"):
        check_text_env(lambda: Corridor(max_steps=0))


# One broken environment for each claim. Each fails that check and no other.

EVER = count()  # never says the same again, in whichever environment


class LacksHashes(Corridor):
    @property
    def task_hash(self) -> Any:  # type: ignore[override]
        raise AttributeError("task_hash")


class StringSplits(Corridor):
    splits = "train"  # type: ignore[assignment]


class StrangeDeterminism(Corridor):
    determinism = "mostly"


class WordyThreadSafe(Corridor):
    thread_safe = "yes"  # type: ignore[assignment]


class StockSpace(Corridor):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = gymnasium.spaces.Text(100)  # type: ignore[assignment]


class RepeatedId(Corridor):
    def tasks(self, split: str) -> list[str]:
        return [*super().tasks(split), f"{split}-0"]


class NumberedTasks(Corridor):
    def tasks(self, split: str) -> Any:
        return [*super().tasks(split), 7]


class NoTestTasks(Corridor):
    def tasks(self, split: str) -> list[str]:
        return super().tasks(split) if split != "test" else []


class ShuffledTasks(Corridor):
    def tasks(self, split: str) -> list[str]:
        tasks = super().tasks(split)
        return random.Random(next(EVER)).sample(tasks, len(tasks))


class ShrinkingTasks(Corridor):
    asked = 0

    def tasks(self, split: str) -> list[str]:
        self.asked += 1
        return super().tasks(split)[: 7 - min(self.asked, 6)] if split == "train" else super().tasks(split)


class UnlistableTasks(Corridor):
    def tasks(self, split: str) -> Any:
        return set(super().tasks(split))


class FourParts(Corridor):
    def step(self, action: str) -> Any:
        return super().step(action)[:4]


class BareReset(Corridor):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0]


class NanReward(Corridor):
    def step(self, action: str) -> Any:
        text, _, *rest = super().step(action)
        return text, float("nan"), *rest


class TextReward(Corridor):
    def step(self, action: str) -> Any:
        text, reward, *rest = super().step(action)
        return text, str(reward), *rest


class NoInfo(Corridor):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0], None


class RaisingStep(Corridor):
    def step(self, action: str) -> Any:
        if self.running and self.steps == 2:
            raise KeyError("door")
        return super().step(action)


class BytesObservation(Corridor):
    def step(self, action: str) -> Any:
        text, *rest = super().step(action)
        return text.encode(), *rest


class SurrogateObservation(Corridor):
    def reset(self, **kwargs: Any) -> Any:
        text, info = super().reset(**kwargs)
        return text + "\ud83c", info


class EndlessObservation(Corridor):
    def step(self, action: str) -> Any:
        text, *rest = super().step(action)
        return text * (70_000 if self.steps == 2 else 1), *rest


class NoSuccessAtReset(Corridor):
    def reset(self, **kwargs: Any) -> Any:
        text, info = super().reset(**kwargs)
        del info["success"]
        return text, info


class NumberSuccess(Corridor):
    def info(self) -> dict[str, Any]:
        return super().info() | {"success": int(self.won)}


class TextActions(Corridor):
    def info(self) -> dict[str, Any]:
        return super().info() | {"actions": "look"}


class ObjectKey(Corridor):
    def info(self) -> dict[str, Any]:
        return super().info() | {"state_key": (self.target, self.at)}


class BothFlagsAtTheLimit(Corridor):
    """Truncates whatever happens at the limit: wrong only where the last step solves the task."""

    def step(self, action: str) -> Any:
        text, reward, terminated, _, info = super().step(action)
        return text, reward, terminated, self.steps >= self.max_steps, info


class NumberFlags(Corridor):
    def step(self, action: str) -> Any:
        text, reward, terminated, truncated, info = super().step(action)
        return text, reward, int(terminated), truncated, info


class ShortHash(Corridor):
    def task_hash(self, task: str) -> str:
        return super().task_hash(task)[:16]


class SaltedHash(Corridor):
    def task_hash(self, task: str) -> str:
        self.goal(task)
        return f"{id(self):064x}"


class ConstantHash(Corridor):
    def task_hash(self, task: str) -> str:
        self.goal(task)
        return "0" * 64


class AnySplit(Corridor):
    def tasks(self, split: str) -> list[str]:
        return super().tasks(split) if split in self.splits else []


class RawKeyError(Corridor):
    def goal(self, task: str) -> int:
        return {known: super(RawKeyError, self).goal(known) for s in self.splits for known in self.tasks(s)}[
            task
        ]


class UnseededSteps(Corridor):
    """Begins as it should, and then draws from a generator that nothing seeds."""

    def reset(self, **kwargs: Any) -> Any:
        answer = super().reset(**kwargs)
        self.weather = random.Random(next(EVER))
        return answer


class ContinuingGenerator(Corridor):
    """Seeds its generator when made, not at each reset: new environments agree, used ones do not."""

    def reset(self, **kwargs: Any) -> Any:
        answer = super().reset(**kwargs)
        self.kept = getattr(self, "kept", random.Random(0))
        self.weather = self.kept
        return answer


class CountingResets(Corridor):
    def reset(self, **kwargs: Any) -> Any:
        text, info = super().reset(**kwargs)
        return f"Episode {self.resets}. {text}", info


class CarriesOver(Corridor):
    """An abandoned episode leaves its weather to the next one."""

    def reset(self, **kwargs: Any) -> Any:
        kept = self.weather if self.running else None
        answer = super().reset(**kwargs)
        self.weather = kept or self.weather
        return answer


class RandomDefaultTask(Corridor):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if not options:
            options = {"task": f"train-{next(EVER) % 20}"}
        return super().reset(seed=seed, options=options)


class NoDefaultTask(Corridor):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert options is not None
        return super().reset(seed=seed, options=options)


class OneStepTooMany(Corridor):
    def limit(self) -> int:
        return self.max_steps + 1


class OneStepTooFew(Corridor):
    def limit(self) -> int:
        return self.max_steps - 1


class NeverRefuses(Corridor):
    def step(self, action: str) -> Any:
        if not hasattr(self, "target"):
            self.reset()
        self.running = True
        return super().step(action)


class ObscureRefusal(Corridor):
    def step(self, action: str) -> Any:
        if not self.running:
            raise AttributeError("'NoneType' object has no attribute 'at'")
        return super().step(action)


class FailsOnUnicode(Corridor):
    def step(self, action: str) -> Any:
        action.encode("ascii")
        return super().step(action)


class FailsOnEmpty(Corridor):
    def step(self, action: str) -> Any:
        action[0]
        return super().step(action)


class FailsOnLength(Corridor):
    def step(self, action: str) -> Any:
        if len(action) > 50_000:
            raise OverflowError("the action is too long")
        return super().step(action)


class Echoes(Corridor):
    def step(self, action: str) -> Any:
        text, *rest = super().step(action)
        return f"{action * 11} {text}", *rest


class OffersTooMuch(Corridor):
    def info(self) -> dict[str, Any]:
        info = super().info()
        return info | {"actions": [*info["actions"], "go down"]}


class DrawsFromRandom(Corridor):
    def step(self, action: str) -> Any:
        random.random()
        return super().step(action)


class SeedsNumpy(Corridor):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        np.random.seed(seed)
        return super().reset(seed=seed, options=options)


class ForgetsWhereItWas(Corridor):
    def restore(self, snapshot: tuple[Any, ...]) -> None:
        at = self.at
        super().restore(snapshot)
        self.at = at


class SharedSnapshot(Corridor):
    """Hands out its living generator: the state that is restored has gone on meanwhile."""

    def snapshot(self) -> tuple[Any, ...]:
        return self.target, self.at, self.steps, self.won, self.running, self.weather

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        self.target, self.at, self.steps, self.won, self.running, self.weather = snapshot


class SpentSnapshot(Corridor):
    """Goes on with the generator inside the snapshot: the second time, it is no longer what it was."""

    def snapshot(self) -> tuple[Any, ...]:
        weather = random.Random()
        weather.setstate(self.weather.getstate())
        return self.target, self.at, self.steps, self.won, self.running, weather

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        self.target, self.at, self.steps, self.won, self.running, self.weather = snapshot


class BoundSnapshot(Corridor):
    """Hands out the number of a state that only this environment has."""

    def snapshot(self) -> Any:
        vars(self).setdefault("kept", []).append(super().snapshot())
        return len(self.kept) - 1

    def restore(self, snapshot: Any) -> None:
        super().restore(self.kept[snapshot])


class LostExpert(Corridor):
    def expert(self) -> str:
        return "open 0"


class SilentExpert(Corridor):
    def expert(self) -> None:
        return None


class BoastingExpert(Corridor):
    """Would win, by a command that the environment understands but does not offer."""

    def actions(self) -> list[str]:
        offered = super().actions()
        return offered if self.hidden else [action for action in offered if action != f"open {self.target}"]

    hidden = False

    def step(self, action: str) -> Any:
        self.hidden = True
        *answer, info = super().step(action)
        self.hidden = False
        return *answer, info | {"actions": self.actions()}


class RaisingExpert(Corridor):
    def expert(self) -> str:
        raise KeyError("no idea")


class OnePlace(Corridor):
    """All environments stand at the same door."""

    snapshot = restore = None  # type: ignore[assignment]

    place: ClassVar[int] = 0

    @property
    def at(self) -> int:
        return self.place

    @at.setter
    def at(self, door: int) -> None:
        type(self).place = door

    def step(self, action: str) -> Any:
        time.sleep(0.0005)
        return super().step(action)


class Served(Corridor):
    """Has a server, from the first reset until it is closed."""

    server: Any = None

    def start(self) -> None:
        self.server = self.server or subprocess.Popen(["sleep", "60"])

    def reset(self, **kwargs: Any) -> Any:
        self.start()
        return super().reset(**kwargs)

    def close(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        self.server = None


class ServedEarly(Served):
    def task_hash(self, task: str) -> str:
        self.start()
        return super().task_hash(task)


class ServedForGood(Served):
    def close(self) -> None:
        self.server = None


class SharedForGood(Served):
    """One server for all of them, and nobody to end it."""

    servers: ClassVar[list[Any]] = []

    def start(self) -> None:
        if not [server for server in self.servers if server.poll() is None]:
            self.servers.append(subprocess.Popen(["sleep", "60"]))


class ClosedForGood(Corridor):
    closed = False

    def close(self) -> None:
        self.closed = True

    def reset(self, **kwargs: Any) -> Any:
        if self.closed:
            raise RuntimeError("it is closed")
        return super().reset(**kwargs)


class BrokenClose(Corridor):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed twice")
        self.closed = True


FAULTS: list[tuple[str, Callable[..., Any], str]] = [
    ("interface", LacksHashes, "lacks task_hash"),
    ("interface", StringSplits, "splits is 'train'"),
    ("interface", StrangeDeterminism, "determinism is 'mostly'"),
    ("interface", WordyThreadSafe, "thread_safe is 'yes'"),
    ("interface", StockSpace, "action_space refuses some texts"),
    ("task ids", RepeatedId, r"tasks\('train'\) lists an id twice"),
    ("task ids", NumberedTasks, r"contains 7 \(int\)"),
    ("task ids", NoTestTasks, r"tasks\('test'\) is \[\]"),
    ("task ids", ShuffledTasks, "other ids"),
    ("task ids", ShrinkingTasks, "other ids"),
    ("task ids", UnlistableTasks, "wanted a sequence"),
    ("answers", FourParts, "step returned a tuple of 4, wanted the tuple"),
    ("answers", BareReset, "reset returned 'Open door"),
    ("answers", NanReward, r"step 1 of task 'train-0': the reward is nan \(float\)"),
    ("answers", TextReward, r"the reward is '0.0' \(str\)"),
    ("answers", NoInfo, r"reset of task 'train-0': info is None"),
    ("answers", RaisingStep, "raised KeyError: 'door'"),
    ("observations", BytesObservation, "step 1 of task 'train-0': the observation is b'"),
    ("observations", SurrogateObservation, "lone surrogate"),
    ("observations", EndlessObservation, r"step 2 of .* characters, observation_space allows 1,000,000"),
    ("success", NoSuccessAtReset, r"reset of task 'train-0': info\['success'\] is missing"),
    ("success", NumberSuccess, "bool"),
    ("optional info", TextActions, r"info\['actions'\] is 'look' \(str\), wanted a list of str"),
    ("optional info", ObjectKey, r"info\['state_key'\] is \(\d, \d\) \(tuple\), wanted str or int"),
    ("flags", BothFlagsAtTheLimit, "terminated and truncated are both set"),
    ("flags", NumberFlags, "terminated is .*wanted a bool"),
    ("task hashes", ShortHash, "wanted 64 lower-case hex digits"),
    ("task hashes", SaltedHash, "different the second time"),
    ("task hashes", ConstantHash, "the same for tasks that begin differently"),
    ("unknown names", AnySplit, r"tasks\(an unknown split\) raised nothing"),
    ("unknown names", RawKeyError, "raised KeyError, wanted an AgentRLError"),
    ("seeds", UnseededSteps, r"differs after \d+ actions"),
    ("group resets", ContinuingGenerator, "played again on a used environment, differs"),
    ("group resets", CarriesOver, "on a used environment, differs after 1 actions"),
    ("group resets", CountingResets, "another first observation"),
    ("default task", RandomDefaultTask, "begins differently the second time"),
    ("default task", NoDefaultTask, "raised AssertionError"),
    ("max_steps", OneStepTooMany, "continues after max_steps=3"),
    ("max_steps", OneStepTooFew, "truncated after 2 steps, max_steps=3"),
    ("step after end", NeverRefuses, "step before the first reset was accepted"),
    ("step after end", ObscureRefusal, "AttributeError: 'NoneType'"),
    ("odd actions", FailsOnUnicode, "UnicodeEncodeError"),
    ("odd actions", FailsOnEmpty, "the action '' .* raised IndexError"),
    ("odd actions", FailsOnLength, "OverflowError"),
    ("odd actions", Echoes, "1,100,0.. characters, observation_space allows 1,000,000"),
    ("admissible actions", OffersTooMuch, "'go down' is in info"),
    ("global randomness", DrawsFromRandom, "global state of random;"),
    ("global randomness", SeedsNumpy, "global state of numpy.random;"),
    ("snapshots", ForgetsWhereItWas, "continues differently"),
    ("snapshots", SharedSnapshot, "continues differently"),
    ("snapshots", SpentSnapshot, "continues differently"),
    ("snapshots", BoundSnapshot, "raised AttributeError: .* 'kept'"),
    ("expert", LostExpert, "the expert solved 0 of 4 tasks"),
    ("expert", SilentExpert, "the expert solved 0 of 4 tasks"),
    ("expert", BoastingExpert, r"the expert's 'open \d' is not in info\['actions'\]"),
    ("expert", RaisingExpert, "raised KeyError: 'no idea'"),
    ("threads", OnePlace, "while other threads play, differs after"),
    ("processes", ServedEarly, "hashing one started sleep"),
    ("processes", ServedForGood, "sleep.* still running 0 s after all were closed"),
    ("processes", SharedForGood, "sleep still running"),
    ("close", ClosedForGood, "raised RuntimeError: it is closed"),
    ("close", BrokenClose, "RuntimeError: closed twice"),
]


@pytest.mark.parametrize(
    ("name", "broken", "detail"), FAULTS, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_fault_fails_exactly_its_own_check(name: str, broken: Callable[..., Any], detail: str) -> None:
    report = check_text_env(broken)
    assert failed(report) == [name], str(report)
    with pytest.raises(EnvironmentContractError, match=detail):
        report.raise_if_failed()


def test_every_check_has_a_broken_environment() -> None:
    assert {name for name, _, _ in FAULTS} == set(NAMES)


def test_both_flags_are_found_only_because_the_limit_is_set_to_the_solution() -> None:
    # Without a settable limit no walk ends on a solving last step, so nothing can be seen.
    assert check_text_env(lambda: BothFlagsAtTheLimit(max_steps=40)).passed


def test_an_environment_of_instances_need_repeat_only_its_beginnings() -> None:
    class Instances(UnseededSteps):
        determinism: ClassVar[str] = "instance"
        snapshot = None  # type: ignore[assignment]

    report = check_text_env(Instances)
    assert report.passed, str(report)
    assert (report.determinism, report.proven) == ("instance", "instance")
    seeds = report.checks[NAMES.index("seeds")]
    assert re.search(
        r"same task and first observation, after that not: 'train-0' differs after", seeds.detail
    )

    class Restless(Instances):
        def reset(self, **kwargs: Any) -> Any:
            text, info = super().reset(**kwargs)
            return f"{text} {id(self)}", info

    assert failed(check_text_env(Restless))[0] == "seeds"

    class OtherTasks(Instances):
        def info(self) -> dict[str, Any]:
            return super().info() | {"task_type": str(id(self))}

    assert failed(check_text_env(OtherTasks))[0] == "seeds"


def test_an_environment_that_repeats_more_than_it_declares_is_told() -> None:
    class Modest(Corridor):
        determinism: ClassVar[str] = "instance"

    report = check_text_env(Modest)
    assert report.passed
    assert (report.determinism, report.proven) == ("instance", "episode")
    assert report.checks[NAMES.index("group resets")].detail.endswith("first observation, and all else")


def test_a_server_that_comes_with_the_first_reset_and_goes_with_close_is_fine() -> None:
    report = check_text_env(Served)
    assert report.passed, str(report)
    assert report.checks[NAMES.index("processes")].detail == (
        "an episode starts sleep, nothing before; none left after close()"
    )


def test_what_is_not_installed_is_no_fault_of_the_contract() -> None:
    class Lacking(Served):
        def reset(self, **kwargs: Any) -> Any:
            self.start()
            raise MissingDependencyError("pip install 'doors'")

    before = running_processes()
    with pytest.raises(MissingDependencyError, match="pip install 'doors'"):
        check_text_env(Lacking)
    assert running_processes() == before


def test_what_cannot_be_played_is_reported_once_and_not_twenty_times() -> None:
    report = check_text_env(FourParts)
    after = NAMES[NAMES.index("answers") + 1 :]
    assert all(statuses(report)[name] == "skipped" for name in after)
    assert "step returned a tuple of 4" in report.checks[-1].detail
    assert f"{len(after)} others" in str(report)


def test_few_environments_are_started_few_at_a_time_and_none_is_left_open() -> None:
    started: list[object] = []
    most = 0

    class Counted(Corridor):
        open = False

        def reset(self, **kwargs: Any) -> Any:
            nonlocal most
            if not self.open:
                self.open = True
                started.append(self)
                most = max(most, sum(env.open for env in started))
            return super().reset(**kwargs)

        def close(self) -> None:
            self.open = False

    class Costly(Counted):
        snapshot = restore = None  # type: ignore[assignment]
        thread_safe = False

    check_text_env(Costly)
    assert (len(started), most) == (9, 3)
    assert not any(env.open for env in started)
