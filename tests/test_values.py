"""What comes from outside is made plain by one rule, or refused with its name."""

import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import Episode, StopReason
from agentrl.env import OneStepEnv, check_text_env
from agentrl.env.contract.answers import plain_info, reset_answer, step_answer
from agentrl.env.panel import Panel, load_panel
from agentrl.env.spaces import TextSpace
from agentrl.errors import CheckpointError, ConfigError, EnvironmentContractError, PanelError
from agentrl.evaluation.panels import data_label
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec, Stop
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.values import ValueFaultError, as_json, as_number, describe_error, describe_value


class Kind(str):
    """A text of a class of its own, which shows itself as something else."""

    def __str__(self) -> str:
        return "another text"


def kind(value: object) -> str:
    return type(value).__name__


class Lamp(gymnasium.Env[str, str]):
    """Two steps; `more` is what its infos hold beside the flag of success."""

    splits = ("train",)
    observation_space = action_space = TextSpace()
    data: Any = None

    def __init__(self, split: str = "train", max_steps: int = 2, more: Any = None) -> None:
        self.max_steps, self.more, self.left = max_steps, more or {}, 0

    def tasks(self, split: str) -> list[Any]:
        return ["train/0"]

    def task_hash(self, task: str) -> str:
        return "0" * 64

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = self.max_steps
        return "a lamp", {"success": False}

    def step(self, action: str) -> Any:
        self.left -= 1
        return "a lamp", 0.5, self.left == 0, False, {"success": self.left == 0, **self.more}


def played(make: Callable[[], Any], task: str = "train/0") -> Episode:
    with EnvironmentPool(make) as pool:
        return collect([EpisodeSpec("e", "lamp", task, 0)], RandomPlayer(), pool, max_active=1).episodes[0]


CONVERTED = [
    ("score", np.float32(0.5), 0.5),
    ("score", np.float16(0.5), 0.5),
    ("score", np.longdouble(0.5), 0.5),
    ("score", np.int64(3), 3.0),
    ("score", np.uint8(3), 3.0),
    ("score", np.bool_(True), 1.0),
    ("score", np.array(2.0), 2.0),
    ("score", Fraction(1, 4), 0.25),
    ("score", Decimal("0.75"), 0.75),
    ("score", True, 1.0),
    ("score", None, None),
    ("success", np.bool_(True), True),
    ("valid", np.bool_(False), False),
    ("other_success", np.array(True), True),
    ("task_type", np.str_("cook"), "cook"),
    ("task_type", Kind("cook"), "cook"),
    ("expert", np.str_("go"), "go"),
    ("state_key", np.int64(-7), -7),
    ("state_key", Kind("s"), "s"),
    ("state_key", 2**128, 2**128),
    ("actions", ("go", np.str_("stay")), ["go", "stay"]),
    ("actions", np.array(["go", "stay"]), ["go", "stay"]),
    ("tool", (np.int8(1), {"a": Fraction(1, 2)}), [1, {"a": 0.5}]),
    ("tool_error", np.array([[1, 2]]), [[1, 2]]),
]


@pytest.mark.parametrize(("key", "given", "kept"), CONVERTED, ids=kind)
def test_what_has_a_plain_value_is_given_it(key: str, given: Any, kept: Any) -> None:
    found = plain_info({"success": False, key: given})[key]
    assert found == kept
    assert type(found) is type(kept)
    json.dumps(found, allow_nan=False)


CYCLE: list[Any] = []
CYCLE.append(CYCLE)

REFUSED = [
    ("score", float("nan"), r"info\['score'\] is nan \(float\), wanted a finite real number"),
    ("score", np.float32("inf"), r"info\['score'\] is np.float32\(inf\) \(float32\), wanted a finite"),
    ("score", 10**400, r"info\['score'\] is 10.*… \(int\), wanted a finite"),
    ("score", 10**5000, r"info\['score'\] is a value without a repr \(int\), wanted a finite"),
    ("score", Decimal("sNaN"), r"info\['score'\] is Decimal"),
    ("score", 1j, r"info\['score'\] is 1j \(complex\)"),
    ("score", "0.5", r"info\['score'\] is '0.5' \(str\)"),
    ("score", {1, 2}, r"info\['score'\] is \{1, 2\} \(set\)"),
    ("score", np.array([1.0, 2.0]), r"info\['score'\] is array"),
    ("task_type", b"cook", r"info\['task_type'\] is b'cook' \(bytes\), wanted a str"),
    ("task_type", "x" * 1001, r"info\['task_type'\] has 1,001 characters, wanted at most 1,000"),
    ("task_type", "\udc80", r"info\['task_type'\] contains a lone surrogate at character 0"),
    ("expert", 3, r"info\['expert'\] is 3 \(int\), wanted a str"),
    ("state_key", 1.5, r"info\['state_key'\] is 1.5 \(float\), wanted str or int"),
    ("state_key", b"s", r"info\['state_key'\] is b's' \(bytes\), wanted str or int"),
    ("state_key", 10**5000, r"info\['state_key'\] is an integer of 16,610 bits, wanted at most 1,024"),
    ("state_key", "s" * 1_000_001, r"info\['state_key'\] has 1,000,001 characters, wanted at most 1,000,000"),
    ("valid", 1, r"info\['valid'\] is 1 \(int\), wanted a bool"),
    ("success", None, r"info\['success'\] is None \(NoneType\), wanted a bool"),
    ("actions", {"go"}, r"info\['actions'\] is \{'go'\} \(set\), wanted a list of str"),
    ("actions", ["go", b"stay"], r"info\['actions'\] contains b'stay' \(bytes\), wanted only str"),
    (
        "actions",
        ["go", "\ud800"],
        r"info\['actions'\] contains '\\ud800' \(str\), which contains a lone surrogate",
    ),
    ("tool", {1, 2}, r"info\['tool'\] is \{1, 2\} \(set\), wanted null, a bool, a number, text, a list"),
    ("tool", {"a": object}, r"info\['tool'\] at 'a' \(str\) is <class 'object'>"),
    ("tool", {3: "x"}, r"info\['tool'\] has a key that is 3 \(int\), wanted a str"),
    ("tool", [float("nan")], r"info\['tool'\] is nan \(float\), wanted a finite"),
    ("tool", CYCLE, r"info\['tool'\] is nested more than 16 deep"),
    ("tool", [0] * 10_001, r"info\['tool'\] contains more than 10,000 values"),
    ("tool_error", ValueError("no"), r"info\['tool_error'\] is ValueError\('no'\) \(ValueError\)"),
    (7, "x", r"info has the key 7 \(int\), wanted only str"),
]


@pytest.mark.parametrize(("key", "given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_has_none_aborts_its_episode_and_is_named(key: Any, given: Any, message: str) -> None:
    with pytest.raises(EnvironmentContractError, match=message):
        reset_answer(("", {"success": False, key: given}))
    episode = played(lambda: Lamp(more={key: given}))
    assert (episode.stop, len(episode.turns)) == (StopReason.CONTRACT, 1)
    assert episode.error is not None


@pytest.mark.parametrize(("key", "given"), [case[:2] for case in CONVERTED + REFUSED], ids=kind)
def test_whatever_an_info_holds_its_episode_is_stored(key: Any, given: Any, tmp_path: Path) -> None:
    episode = played(lambda: Lamp(more={key: given}))
    write_episodes(tmp_path / "e.parquet", [episode])
    assert read_episodes(tmp_path / "e.parquet") == [episode]


@pytest.mark.parametrize(
    ("reward", "kept"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (Fraction(1, 2), 0.5),
        (Decimal("0.5"), 0.5),
        (np.array(0.5), 0.5),
    ],
)
def test_rewards_of_any_real_kind_are_floats(reward: Any, kept: float) -> None:
    answer = step_answer(("", reward, np.bool_(False), np.bool_(True), {"success": np.bool_(False)}))
    assert answer == ("", kept, False, True, {"success": False})
    assert [type(part) for part in answer[:4]] == [str, float, bool, bool]


@pytest.mark.parametrize(
    "reward",
    [10**400, Decimal("1e999"), Fraction(10**400), "1", None, 1j, [1.0]],
    ids=kind,
)
def test_rewards_that_no_float_holds_are_refused(reward: Any) -> None:
    with pytest.raises(EnvironmentContractError, match=r"the reward is .*, wanted a finite real"):
        step_answer(("", reward, False, False, {"success": False}))


def test_an_unknown_key_is_for_players_alone(tmp_path: Path) -> None:
    whole = plain_info({"success": False, "map": {1, 2}})
    assert whole["map"] == {1, 2}
    episode = played(lambda: Lamp(more={"map": object()}))
    assert [dict(turn.info) for turn in episode.turns] == [{"success": False}, {"success": True}]


def test_environments_with_numpys_flags_keep_the_contract() -> None:
    class Numbered(Lamp):
        def step(self, action: str) -> Any:
            if self.left == 0:
                raise RuntimeError("the end")
            text, reward, terminated, truncated, info = super().step(action)
            return np.str_(text), np.float32(reward), np.bool_(terminated), np.bool_(truncated), info

    report = check_text_env(Numbered)
    failed = {check.name for check in report.failed}
    assert not failed & {"answers", "observations", "success", "optional info", "flags"}


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (RuntimeError("a \udc80 b"), r"RuntimeError: a \udc80 b"),
        (RuntimeError("x" * 5000), f"RuntimeError: {'x' * 3946}… (5,014 characters)"),
        (UnspeakableError(), "UnspeakableError: a message that cannot be read"),
    ],
)
@pytest.mark.parametrize("where", ["inline", "process"])
def test_an_environments_error_is_kept_as_text(
    error: Exception, kept: str, where: str, tmp_path: Path
) -> None:
    class Failing(Lamp):
        def step(self, action: str) -> Any:
            raise error

    if where == "inline":
        episode = played(Failing)
    else:
        with ProcessEnvironments(Failing, 1, WorkersConfig(count=1)) as environments:
            spec = EpisodeSpec("e", "lamp", "train/0", 0)
            (episode,) = collect([spec], RandomPlayer(), environments, max_active=1).episodes
    assert (episode.stop, episode.error) == (StopReason.ENV_ERROR, kept)
    write_episodes(tmp_path / "e.parquet", [episode])
    assert read_episodes(tmp_path / "e.parquet") == [episode]


def test_describing_never_fails() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert describe_value(Mute()) == "a value without a repr (Mute)"
    assert describe_value("\ud800") == r"'\ud800' (str)"
    assert len(describe_value("x" * 10**6)) < 100
    assert describe_error(ValueError("\ud800")) == r"ValueError: \ud800"
    assert Stop(StopReason.ENV_ERROR, "\ud800").error == r"\ud800"


def test_a_number_that_only_claims_to_be_one_is_refused() -> None:
    class Liar(Fraction):
        def __float__(self) -> float:
            raise ValueError("not today")

    with pytest.raises(ValueFaultError, match="wanted a finite real number"):
        as_number(Liar(1, 2))
    assert as_json({"a": None}) == {"a": None}


@pytest.mark.parametrize("task", [3, None, b"train/0", "\ud800"])
def test_an_id_of_a_task_is_text(task: Any) -> None:
    with pytest.raises(EnvironmentContractError, match="lamp: the id of a task "):
        EpisodeSpec("e", "lamp", task, 0)
    with pytest.raises(PanelError, match=r"Panel\.tasks: a text "):
        Panel("lamp", "train", (task,), ("0" * 64,))


def test_a_panel_of_anything_is_a_panel_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "panel.json"
    for content in (b"[" * 100_000, b"1" * 5000, b'"\\ud800"', b'{"format": NaN}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(PanelError, match=r"panel\.json"):
            load_panel(path)
    head = {
        "format": "agentrl panel 1",
        "env": "lamp",
        "split": "train",
        "hash": "",
        "tasks": {"\ud800": "0"},
    }
    path.write_text(json.dumps(head | {"env_kwargs": {}}))
    with pytest.raises(PanelError, match="a lone surrogate"):
        load_panel(path)
    with pytest.raises(PanelError, match="env_kwargs must be JSON values"):
        Panel("lamp", "train", ("a",), ("0",), {"path": "\ud800"})


@pytest.mark.parametrize("label", [3, b"x", ["x"], "x" * 1001, "\ud800"])
def test_a_label_of_the_data_is_text(label: Any) -> None:
    class Labelled(Lamp):
        data = label

    with (
        EnvironmentPool(Labelled) as pool,
        pytest.raises(EnvironmentContractError, match="the environment's attribute data "),
    ):
        data_label(pool)


def test_a_problem_of_numpys_numbers_has_the_hash_of_pythons() -> None:
    def content(level: Any) -> str:
        return OneStepEnv({"train": [{"prompt": "?", "level": level}]}, lambda *_: 0.0).task_hash("train/0")

    assert content(np.int64(3)) == content(3)
    assert content(np.float32(0.5)) == content(Fraction(1, 2)) == content(0.5)
    for wrong in ({1}, object(), b"x"):
        with pytest.raises(
            ConfigError, match=r"problem 'train/0' does not consist of JSON values: a value is"
        ):
            content(wrong)
    assert len(content("\ud800")) == 64


def test_a_turn_that_nobody_checked_is_refused_by_the_file(tmp_path: Path) -> None:
    from dataclasses import replace

    episode = played(Lamp)
    turns = (replace(episode.turns[0], info={"score": {1}}), *episode.turns[1:])
    with pytest.raises(
        CheckpointError, match=r"e\.parquet: an episode cannot be stored: info of episode 'e' at"
    ):
        write_episodes(tmp_path / "e.parquet", [replace(episode, turns=turns)])
    assert list(tmp_path.iterdir()) == []
    turns = (replace(episode.turns[0], observation="\ud800"),)
    with pytest.raises(CheckpointError, match="cannot be stored"):
        write_episodes(tmp_path / "e.parquet", [replace(episode, turns=turns)])
