"""`check_text_env` accepts a correct environment and pins every fault to the one claim that it breaks."""

import random
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from text_worlds import Corridor

from agentrl.env import ContractReport, check_text_env
from agentrl.env.checks import CHECKS
from agentrl.errors import ConfigError, EnvironmentContractError

NAMES = [name for name, _ in CHECKS]


def statuses(report: ContractReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def failed(report: ContractReport) -> list[str]:
    return [check.name for check in report.failed]


def test_a_correct_environment_passes_every_check() -> None:
    report = check_text_env(Corridor)
    assert statuses(report) == dict.fromkeys(NAMES, "passed"), str(report)
    assert (report.passed, report.env, report.determinism) == (True, "Corridor", "episode")
    assert report.declares == ("snapshot", "expert", "data: generated")
    report.raise_if_failed()


def test_what_an_environment_does_not_declare_is_skipped() -> None:
    class Bare(Corridor):
        snapshot = restore = expert = None  # type: ignore[assignment]

        def info(self) -> dict[str, Any]:
            return {"success": self.won}

    report = check_text_env(lambda: Bare())
    assert [name for name, status in statuses(report).items() if status == "skipped"] == [
        "admissible actions",
        "snapshots",
        "expert",
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
    assert "failed  close" in str(report)
    assert "passed  snapshots" in str(report)
    with pytest.raises(
        EnvironmentContractError, match=r"BrokenClose breaks .* close: raised RuntimeError: closed twice"
    ):
        report.raise_if_failed()


def test_an_interrupt_is_not_taken_for_a_fault() -> None:
    class Interrupted(Corridor):
        def step(self, action: str) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_text_env(Interrupted)


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


class NoSuccessAtReset(Corridor):
    def reset(self, **kwargs: Any) -> Any:
        text, info = super().reset(**kwargs)
        del info["success"]
        return text, info


class NumpySuccess(Corridor):
    def info(self) -> dict[str, Any]:
        return super().info() | {"success": np.bool_(self.won)}


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


class NumpyFlags(Corridor):
    def step(self, action: str) -> Any:
        text, reward, terminated, truncated, info = super().step(action)
        return text, reward, np.bool_(terminated), truncated, info


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
    ("interface", StockSpace, "action_space refuses some texts"),
    ("task ids", RepeatedId, r"tasks\('train'\) lists an id twice"),
    ("task ids", NumberedTasks, r"holds 7 \(int\)"),
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
    ("success", NoSuccessAtReset, r"reset of task 'train-0': info\['success'\] is missing"),
    ("success", NumpySuccess, "bool"),
    ("optional info", TextActions, r"info\['actions'\] is 'look' \(str\), wanted a list of str"),
    ("optional info", ObjectKey, r"info\['state_key'\] is \(\d, \d\) \(tuple\), wanted str or int"),
    ("flags", BothFlagsAtTheLimit, "terminated and truncated are both set"),
    ("flags", NumpyFlags, "terminated is .*wanted a bool"),
    ("task hashes", ShortHash, "wanted 64 lower-case hex digits"),
    ("task hashes", SaltedHash, "another one the second time"),
    ("task hashes", ConstantHash, "the same for tasks that begin differently"),
    ("unknown names", AnySplit, r"tasks\(an unknown split\) raised nothing"),
    ("unknown names", RawKeyError, "raised KeyError, wanted an AgentRLError"),
    ("seeds", UnseededSteps, r"differs after \d+ actions"),
    ("group resets", ContinuingGenerator, "played again on a used environment, differs"),
    ("group resets", CountingResets, "another first observation"),
    ("default task", RandomDefaultTask, "begins differently the second time"),
    ("default task", NoDefaultTask, "raised AssertionError"),
    ("max_steps", OneStepTooMany, "goes on after max_steps=3"),
    ("max_steps", OneStepTooFew, "truncated after 2 steps, max_steps=3"),
    ("step after end", NeverRefuses, "step before the first reset was accepted"),
    ("step after end", ObscureRefusal, "AttributeError: 'NoneType'"),
    ("odd actions", FailsOnUnicode, "UnicodeEncodeError"),
    ("odd actions", FailsOnEmpty, "the action '' .* raised IndexError"),
    ("odd actions", FailsOnLength, "OverflowError"),
    ("admissible actions", OffersTooMuch, "'go down' is in info"),
    ("global randomness", DrawsFromRandom, "global state of random;"),
    ("global randomness", SeedsNumpy, "global state of numpy.random;"),
    ("snapshots", ForgetsWhereItWas, "goes on differently"),
    ("snapshots", SharedSnapshot, "goes on differently"),
    ("snapshots", SpentSnapshot, "goes on differently"),
    ("expert", LostExpert, "the expert solved 0 of 4 tasks"),
    ("expert", SilentExpert, "the expert solved 0 of 4 tasks"),
    ("expert", BoastingExpert, r"the expert's 'open \d' is not in info\['actions'\]"),
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
    assert report.determinism == "instance"

    class Restless(Instances):
        def reset(self, **kwargs: Any) -> Any:
            text, info = super().reset(**kwargs)
            return f"{text} {id(self)}", info

    assert failed(check_text_env(Restless))[0] == "seeds"


def test_what_cannot_be_played_is_reported_once_and_not_twenty_times() -> None:
    report = check_text_env(FourParts)
    after = NAMES[NAMES.index("answers") + 1 :]
    assert all(statuses(report)[name] == "skipped" for name in after)
    assert "step returned a tuple of 4" in report.checks[-1].detail


def test_checking_leaves_no_environment_open() -> None:
    open_now: set[int] = set()

    class Counted(Corridor):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            open_now.add(id(self))
            kept.append(self)

        def close(self) -> None:
            open_now.discard(id(self))

    kept: list[Corridor] = []
    check_text_env(Counted)
    assert len(kept) > 20
    assert not open_now
