"""Every number of every block and recipe has bounds: what is outside is refused, what is inside runs."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt
from typer.testing import CliRunner

import agentrl
from agentrl.algorithms import recipe as recipes
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.recipe import Recipe, build_recipe, recipe, recipe_class, recipe_names
from agentrl.cli import app
from agentrl.config import bounds_of
from agentrl.errors import ConfigError
from agentrl.run.logger import RunLogger
from agentrl.run.settings import RunConfig, config_from_tree
from agentrl.study.config import StudyConfig

pytestmark = pytest.mark.usefixtures("undrawn")

HUGE = int("7" * 400)
VALUES = (-1, 0, 1e308, math.nan, math.inf, "", [3], HUGE)
TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=1",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "warm_start.steps=1",
    "warm_start.demonstrations=2",
    "warm_start.batch_size=2",
    "trainer.steps=1",
    "policy.tokenizer_episodes=2",
    "policy.hidden_size=16",
    "policy.heads=1",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "rollout.placement=inline",
    "rollout.max_turns=4",
)

CLIPPED = (
    *("appo", "canon", "dr_grpo", "gigpo", "graphgpo", "grpo", "hgpo", "hiper"),
    *("maxrl", "ppo", "prime", "reinforce_pp", "rloo"),
)
# What is let through of VALUES, and trains; every recipe with a clipped ratio has those of the last lines.
ACCEPTED = {
    -1: {
        "aepo.advantage_limits.0",
        "aepo.branch_offset",
        "aepo.entropy_weight",
        "clip_cov.band.0",
        "spear.covariance_band.0",
        "spear.replay_covariance_band.0",
        *("canon.beta", "e3b.reward_range.0"),
        *(f"{name}.entropy_coefficient" for name in CLIPPED),
        *("one_shot.entropy_coefficient", "pear.failure_reward"),
        *("t1.entropy_coefficient", "t1.overflow_reward"),
    },
    0: {
        "seed",
        *(f"engine.{name}" for name in ("actor_cpus", "actor_gpus", "actor_restarts", "vllm.max_restarts")),
        "engine.endpoint.retries",
        *(f"rollout.{name}" for name in ("max_aborted_share", "ray.cpus", "ray.max_restarts")),
        *(f"trainer.{name}" for name in ("max_staleness", "save_episodes_every", "steps")),
        *("evaluation.every", "policy.examples", "warm_start.noise", "warm_start.steps"),
        *(
            f"{block}.{name}"
            for block in ("learner", "warm_start.learner")
            for name in ("beta1", "beta2", "momentum", "warmup_steps", "weight_decay")
        ),
        *(f"aepo.{name}" for name in ("advantage_limits.0", "allocation_slope", "branch_offset")),
        *(f"aepo.{name}" for name in ("branch_penalty", "branch_probability", "entropy_advantage")),
        "aepo.entropy_weight",
        *("clip_cov.band.0", "clip_cov.share"),
        "appo.influence",
        *("arbitrary_entropy.replaced", "arbitrary_entropy.target", "arbitrary_entropy.tempered"),
        *("cure.second_stage", "dcpo.reach", "dcpo.target", "ettrl.points"),
        *("ares.decay", "ares.kl_coefficient", "ares.strength"),
        *("bapo.lower.0", "bapo.target"),
        *("canon.alpha", "canon.beta", "canon.mix", "canon.peak"),
        "aem.k",
        *("copo.centre", "copo.steepness"),
        *("cispo.clip_high", "cispo.clip_low"),
        "dapo.overlong_cache",
        *("distill.beta", "distill.discount", "distill.reward_coefficient"),
        *("drpo.radius", "drpo.trust", "entropy_sft.weight"),
        *("e3b.coefficient", "e3b.error_share", "e3b.reward_range.0", "e3b.reward_range.1"),
        "dppo.log_ratio_coefficient",
        *("empg.k", "empg.k_future", "empg.zeta"),
        *(f"epo.{name}" for name in ("entropy_coefficient", "low", "penalty", "schedule_rate", "window")),
        "fr3e.anchors",
        *("gigpo.gamma", "gigpo.step_weight"),
        *("graphgpo.episode_weight", "graphgpo.step_weight"),
        *("hgpo.alpha", "hgpo.gamma", "hgpo.history"),
        *(f"hapo.{name}" for name in ("clip", "pivot", "redistribution", "temperature_change", "widening")),
        *("hicra.alpha", "light_if.coefficient"),
        *(f"t2po.{name}" for name in ("change", "entropy_weight", "flat", "least_thoughts", "resamples")),
        *("hiper.gamma", "hiper.lam", "hiper.lam_segment", "hiper.value_coefficient"),
        *(f"hiper.{name}_penalty" for name in ("change", "keep", "keep_share")),
        "kl_cov.coefficient",
        "lare.warmup",
        *("lp_reg.coefficient", "lp_reg.share"),
        "mis.low",
        "sampo.cold_start",
        *(f"one_shot.{name}" for name in ("entropy_coefficient", "tasks", "warmup")),
        *(f"pear.{name}" for name in ("alpha", "failure_reward", "success_reward")),
        *("ppo.gamma_turn", "ppo.lam_turn", "ppo.value_coefficient"),
        *("prime.accuracy.0", "prime.outcome_coefficient", "prime.process_coefficient"),
        *("reinforce_pp.gamma", "reinforce_pp.reward_kl_coefficient"),
        *("seed_grpo.alpha", "siren.anchor", "siren.coefficient", "siren.quantile"),
        *(f"t1.{name}" for name in ("entropy_coefficient", "kl_coefficient", "overflow_reward")),
        *("vogue.input_weight", "vogue.output_weight"),
        *(f"spear.{name}" for name in ("coefficient", "covariance_band.0", "covariance_share")),
        *(f"spear.{name}" for name in ("replay_covariance_band.0", "replay_covariance_share")),
        *("spear.tool_reward", "spear.warmup"),
        *(
            f"{name}.{bound}"
            for name in ("dapo", "dr_bot", "fr3e", "gspo", "sampo")
            for bound in ("clip_high", "clip_low")
        ),
        *(
            f"{name}.{field}"
            for name in CLIPPED
            for field in ("clip_high", "clip_low", "entropy_coefficient", "invalid_penalty", "kl_coefficient")
        ),
    },
}
# Within their bounds, and refused for what stands beside them.
CONTRADICTIONS = {
    "aepo.advantage_limits.1": "wanted a range that contains 1",
    "prime.accuracy.1": "wanted the lower bound first",
    "clip_cov.band.1": "wanted the lower bound first",
    "e3b.reward_range.1": "wanted the lower bound first",
    "distill.interpolation": "wanted 1, or mode=loss",
    "spear.covariance_band.1": "wanted the lower bound first",
    "spear.replay_covariance_band.1": "wanted the lower bound first",
}


@dataclasses.dataclass(frozen=True)
class Number:
    """A field that holds a number, or one place of a tuple of numbers."""

    owner: type
    block: tuple[str, ...]  # the keys that lead to its block
    name: str
    kind: Any
    place: int | None = None

    @property
    def path(self) -> str:
        return ".".join((*self.block, self.name, *([] if self.place is None else [str(self.place)])))

    @property
    def key(self) -> str:
        """Of ACCEPTED."""
        return self.path if not issubclass(self.owner, Recipe) else f"{self.owner.name}.{self.path}"

    def given(self, value: Any) -> Any:
        """What the field is to hold so that this number is `value`."""
        if self.place is None:
            return value
        default = next(item.default for item in dataclasses.fields(self.owner) if item.name == self.name)
        return [value if place == self.place else other for place, other in enumerate(default)]

    def refusal(self, value: Any) -> str | None:
        """What a configuration with that value is told; None if nothing."""
        try:
            if issubclass(self.owner, Recipe):
                build_recipe(self.owner.name, {self.name: self.given(value)}, "")
            else:
                tree: Any = {self.name: self.given(value)}
                for key in reversed(self.block):
                    tree = {key: tree}
                config_from_tree(tree)
        except ConfigError as error:
            return str(error)
        return None


def numbers(owner: type, block: tuple[str, ...] = ()) -> Iterator[Number]:
    """All numbers of a dataclass and of those in it, found by their types."""
    hints = typing.get_type_hints(owner, include_extras=True)
    for item in dataclasses.fields(owner):
        for kind in branches(hints[item.name]):
            if dataclasses.is_dataclass(kind):
                yield from numbers(typing.cast(type, kind), (*block, item.name))
            elif typing.get_origin(kind) is tuple:
                for place, inner in enumerate(typing.get_args(kind)):
                    if plain(inner) in (int, float):
                        yield Number(owner, block, item.name, inner, place)
            elif plain(kind) in (int, float):
                yield Number(owner, block, item.name, kind)


def branches(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def plain(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


RECIPES = [name for name in recipe_names() if recipe_class(name).__module__.startswith("agentrl.")]
BLOCKS = list(numbers(RunConfig))
ALL = [*BLOCKS, *(number for name in RECIPES for number in numbers(recipe_class(name)))]


def test_the_walk_finds_the_numbers() -> None:
    paths = {number.path for number in BLOCKS}
    assert {
        "seed",
        "warm_start.learner.lora.rank",
        "rollout.workers.count",
        "engine.vllm.max_restarts",
    } < paths
    keys = {number.key for number in ALL}
    assert {"grpo.clip_low", "aepo.advantage_limits.1", "aepo.initial_rollouts", "spear.warmup"} < keys


@pytest.mark.parametrize("number", [*ALL, *numbers(StudyConfig)], ids=lambda number: number.key)
def test_every_number_declares_a_lower_and_an_upper_bound(number: Number) -> None:
    assert typing.get_origin(number.kind) is Annotated, f"{number.key} has no bounds"
    found: set[type] = set()
    for item in number.kind.__metadata__:
        found |= {type(bound) for bound in (item if isinstance(item, GroupedMetadata) else (item,))}
    assert found & {Ge, Gt}
    assert found & {Le, Lt}


@pytest.mark.filterwarnings("ignore:epo:UserWarning")
def test_what_is_outside_is_refused_with_path_value_and_bounds() -> None:
    passed: dict[Any, set[str]] = {-1: set(), 0: set()}
    refused = contradictions = 0
    for number in ALL:
        for value in VALUES:
            told = number.refusal(value)
            if told is None:
                passed[value].add(number.key)
            elif (reason := CONTRADICTIONS.get(number.key)) is not None and reason in told:
                contradictions += 1
            else:
                shown = f"{str(value)[:57]}..." if value == HUGE else repr(value)
                assert told.startswith(f"{number.path}: wrong value (got {shown}, wanted "), (
                    number.key,
                    told,
                )
                assert bounds_of(number.kind) in told, (number.key, told)
                assert "\n" not in told
                refused += 1
    assert passed == ACCEPTED
    assert refused + contradictions + sum(map(len, passed.values())) == len(ALL) * len(VALUES)


@pytest.mark.filterwarnings("ignore:epo:UserWarning")
@pytest.mark.parametrize("owner", sorted({number.owner for number in ALL}, key=lambda owner: owner.__name__))
def test_what_is_made_in_python_is_refused_as_well(owner: type) -> None:
    for number in ALL:
        if number.owner is not owner:
            continue
        for value in VALUES:
            if number.refusal(value) is not None:
                with pytest.raises(ConfigError, match=number.name):
                    owner(**{number.name: number.given(value)})


def test_bounds_are_told_in_words() -> None:
    told = {number.key: bounds_of(number.kind) for number in ALL}
    assert told["grpo.clip_low"] == "at least 0 and at most 1"
    assert told["gigpo.similarity"] == "above 0 and at most 1"
    assert told["learner.beta1"] == "at least 0 and below 1"
    assert told["seed"] == "at least 0 and at most 9223372036854775807"


@pytest.mark.parametrize("text", ["-1", "1e308", ".nan", ".inf", "''", "[3]", str(HUGE), "9" * 5000])
def test_the_command_tells_all_mistakes_at_once_and_writes_nothing(text: str, tmp_path: Path) -> None:
    paths = [number.path for number in BLOCKS if text != "-1" or number.key not in ACCEPTED[-1]]
    paths.append("algorithm.clip_low")
    answer = CliRunner().invoke(
        app, ["train", f"run.folder={tmp_path}", "trainer.mode=asink", *(f"{path}={text}" for path in paths)]
    )
    assert answer.exit_code == 2
    assert isinstance(answer.exception, SystemExit)
    lines = [line.rpartition(" [")[0] or line for line in answer.output.removeprefix("error: ").splitlines()]
    if len(text) < 4000:
        assert {line.split(": ")[0] for line in lines} == {*paths, "trainer.mode"}
        assert len(lines) == len(paths) + 1
        assert "trainer.mode: wrong value (got 'asink', wanted 'sync' or 'async')" in lines
    else:
        told = ["an integer of 5000 digits, wanted at most 4000"] * len(paths)
        assert [line.split(": ")[-1] for line in lines] == told
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_an_integer_is_that_of_what_can_be_read() -> None:
    with pytest.raises(ConfigError, match=r"^seed: wrong value \(got a very large integer, wanted "):
        RunConfig(seed=10**5000)


def test_a_recipe_of_ones_own_is_held_to_what_it_declares(
    examples: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.algorithms.recipe._recipes", dict(recipes._recipes))  # forgotten afterwards
    own = examples["rloo"].LeaveOneOut
    with pytest.raises(
        ConfigError, match=r"^scale: wrong value \(got nan, wanted at least -1000000 and at most "
    ):
        own(scale=math.nan)
    assert own(scale=-2).scale == -2

    @recipe("unbounded")
    @dataclasses.dataclass(frozen=True)
    class Unbounded(Recipe):
        pace: float = 1.0

        def build(self) -> Algorithm:
            return Algorithm()

    assert Unbounded(pace=-1e300).pace == -1e300
    for value in (math.nan, math.inf, HUGE):
        with pytest.raises(ConfigError, match=r"^pace: wrong value \(.*, wanted a finite number\)$"):
            Unbounded(pace=value)
    with pytest.raises(ConfigError, match=r"^pace: wrong value \(got '', wanted a number\)$"):
        Unbounded(pace=typing.cast(float, ""))


def trained(number: Number, value: Any, folder: Path) -> list[Mapping[str, Any]]:
    """The training rows of a short run with that value."""
    given = number.given(value)
    own = (f"{number.path.removesuffix(f'.{number.place}')}={given}",)
    if issubclass(number.owner, Recipe):
        own = (f"algorithm.name={number.owner.name}", f"algorithm.{number.name}={given}")
    run = agentrl.train(agentrl.load_config(None, *TINY, f"run.folder={folder}", *own), quiet=True)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "train"]


LET_THROUGH = [(number, value) for number in ALL for value, keys in ACCEPTED.items() if number.key in keys]
SAMPLE = {"aepo.entropy_weight", "learner.beta1", "spear.covariance_band.0"}


@pytest.mark.filterwarnings("ignore:epo:UserWarning")
@pytest.mark.parametrize(
    ("number", "value"),
    [
        pytest.param(
            number,
            value,
            id=f"{number.key}={value}",
            marks=() if number.key in SAMPLE and value == 0 else pytest.mark.slow,
        )
        for number, value in LET_THROUGH
    ],
)
def test_what_is_let_through_trains(
    number: Number, value: Any, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    rows = trained(number, value, tmp_path)
    assert len(rows) == (0 if number.key == "trainer.steps" else 1)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (("rollout.group_size=1",), True),
        (("rollout.group_size=1", "algorithm.name=gigpo"), True),
        (("rollout.group_size=1", "algorithm.name=ppo"), False),
        (("rollout.group_size=1", "algorithm.name=rloo", "algorithm.singleton=raw"), True),
        (("rollout.group_size=2",), False),
    ],
)
def test_a_group_of_one_is_warned_of_where_groups_are_compared(
    overrides: tuple[str, ...],
    warned: bool,
    examples: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(RunLogger, "say", lambda self, text: said.append(text))
    agentrl.train(agentrl.load_config(None, *TINY, f"run.folder={tmp_path}", *overrides), quiet=True)
    assert any(text.startswith("warning: rollout.group_size is 1, but") for text in said) is warned
