"""Environments by id: plug-ins are found, broken ones hurt nobody, mistakes come back with suggestions."""

import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
from text_worlds import Corridor

from agentrl.env import broken_plugins, env_ids, load_plugins, make, register, registry
from agentrl.errors import ConfigError, MissingDependencyError

WORLDS = "text_worlds:Corridor"


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no plug-in had been loaded yet, none of the installed ones being there."""
    kept = dict(gymnasium.registry)
    monkeypatch.setattr(registry, "_plugins", registry._Plugins())
    installed = registry.entry_points

    def only_ours(group: str) -> list[Any]:
        return [entry for entry in installed(group=group) if entry.value.startswith("plug_")]

    monkeypatch.setattr(registry, "entry_points", only_ours)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(kept)
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a distribution `name` with one plug-in, whose module has the given code."""

    def install(name: str, code: str) -> None:
        (tmp_path / f"plug_{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[agentrl.envs]\n{name} = plug_{name}:register\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def plug(*ids: str) -> str:
    calls = "\n".join(f"    agentrl.env.register({id!r}, {WORLDS!r})" for id in ids)
    return f"import agentrl.env\n\ndef register():\n{calls}\n"


def test_a_plugins_environment_is_made_by_gymnasium_and_by_us(install: Any) -> None:
    install("doors", plug("test/Doors-v0"))
    load_plugins()
    env = gymnasium.make("test/Doors-v0", split="test", max_steps=4)
    observation, info = env.reset(seed=1, options={"task": "test-2"})
    assert observation.startswith("Open door ")
    assert info["actions"] == ["open 0", "go right"]
    assert isinstance(env.unwrapped, Corridor)
    assert env.unwrapped.max_steps == 4
    # No wrapper counts steps, checks spaces or enforces an order: limits are the environment's own.
    assert env is env.unwrapped
    assert isinstance(make("test/Doors-v0").unwrapped, Corridor)
    assert env_ids() == ["test/Doors-v0"]


def test_plugins_are_loaded_once(install: Any) -> None:
    install(
        "once",
        plug("test/Once-v0") + "    import builtins; builtins.loads = getattr(builtins, 'loads', 0) + 1\n",
    )
    import builtins

    try:
        load_plugins()
        load_plugins()
        make("test/Once-v0")
        assert builtins.loads == 1  # type: ignore[attr-defined]
    finally:
        del builtins.loads  # type: ignore[attr-defined]


def test_a_plugin_may_ask_for_environments_while_it_registers(install: Any) -> None:
    install("curious", plug("test/Curious-v0") + "    assert 'test/Curious-v0' in agentrl.env.env_ids()\n")
    assert env_ids() == ["test/Curious-v0"]
    assert broken_plugins() == {}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit('sorry')", "SystemExit: sorry"),
        ("def register():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "AttributeError"),
        ("register = 'text'", "TypeError: 'str' object is not callable"),
        (plug("no spaces allowed"), "ConfigError: environment id 'no spaces allowed'"),
    ],
)
def test_a_broken_plugin_is_reported_and_hurts_nobody(install: Any, code: str, error: str) -> None:
    install("broken", code)
    install("healthy", plug("test/Healthy-v0"))
    with pytest.warns(RuntimeWarning, match="plug-in 'broken' of broken .* is broken and was skipped"):
        load_plugins()
    assert env_ids() == ["test/Healthy-v0"]
    ((plugin, reason),) = broken_plugins().items()
    assert plugin == "plug-in 'broken' of broken (plug_broken:register)"
    assert error in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_plugins()


def test_an_unknown_id_names_the_plugin_that_might_have_had_it(install: Any) -> None:
    install("broken", "import no_such_module")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ConfigError, match=r"plug_broken.*No module named 'no_such_mod"),
    ):
        make("test/Lost-v0")


def test_two_plugins_with_one_id_are_an_error_that_names_both_each_time(install: Any) -> None:
    install("first", plug("test/Same-v0"))
    install("second", plug("test/Same-v0"))
    install("third", plug("test/Third-v0"))
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"'test/Same-v0' is registered twice: by .*'first'.* and by .*'second'"
        ):
            load_plugins()
    with pytest.raises(ConfigError, match="registered twice"):
        make("test/Third-v0")


def test_one_plugin_may_register_an_id_again(install: Any) -> None:
    install("twice", plug("test/Twice-v0", "test/Twice-v0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env_ids() == ["test/Twice-v0"]


def test_a_script_may_say_before_or_after_a_plugin_what_the_plugin_says(install: Any) -> None:
    install("doors", plug("test/Doors-v0"))
    register("test/Doors-v0", WORLDS)
    assert env_ids() == ["test/Doors-v0"]
    register("test/Doors-v0", WORLDS)
    with pytest.raises(ConfigError, match=r"registered twice: by .* and by module test_registry"):
        register("test/Doors-v0", WORLDS, max_steps=3)


def test_an_id_that_gymnasium_knows_already_cannot_be_taken() -> None:
    with pytest.raises(
        ConfigError, match=r"'CartPole-v1' is registered twice: by Gymnasium .* and by module test_reg"
    ):
        register("CartPole-v1", Corridor)


def test_defaults_given_at_registration_can_be_overridden() -> None:
    register("test/Short-v0", Corridor, max_steps=3, split="test")
    env: Any = make("test/Short-v0").unwrapped
    assert (env.max_steps, env.split) == (3, "test")
    assert make("test/Short-v0", max_steps=5).unwrapped.max_steps == 5  # type: ignore[attr-defined]


def test_an_unknown_id_comes_back_with_a_suggestion() -> None:
    register("test/Doors-v0", Corridor)
    with pytest.raises(
        ConfigError, match=r"environment 'test/Door-v0' is unknown; did you mean 'test/Doors-v0'\?"
    ):
        make("test/Door-v0")


@pytest.mark.parametrize("entry_point", [Corridor, WORLDS])
def test_an_unknown_argument_comes_back_with_a_suggestion(entry_point: Any) -> None:
    register("test/Doors-v0", entry_point)
    with pytest.raises(
        ConfigError, match=r"argument of test/Doors-v0 'max_step' is unknown; did you mean 'max_steps'"
    ):
        make("test/Doors-v0", max_step=3)


def test_an_unknown_split_comes_back_with_a_suggestion() -> None:
    register("test/Doors-v0", Corridor)
    with pytest.raises(ConfigError, match=r"split of test/Doors-v0 'tests' is unknown; did you mean 'test'"):
        make("test/Doors-v0", split="tests")


def test_a_wrong_value_is_a_mistake_of_the_configuration() -> None:
    def refuse(limit: int) -> Any:
        raise ValueError("limit must be even")

    register("test/Refuse-v0", refuse)
    with pytest.raises(
        ConfigError, match=r"'test/Refuse-v0' refused its arguments {'limit': 3}: limit must be even"
    ):
        make("test/Refuse-v0", limit=3)
    with pytest.raises(ConfigError, match=r"'test/Refuse-v0' refused its arguments {}: .*missing 1 required"):
        make("test/Refuse-v0")


def test_an_environments_own_message_is_kept() -> None:
    register("test/Doors-v0", Corridor)
    with pytest.raises(ConfigError, match=r"^max_steps is 0, wanted at least 1$"):
        make("test/Doors-v0", max_steps=0)


def test_a_module_that_is_not_installed_is_a_missing_dependency() -> None:
    register("test/Absent-v0", "no_such_module:Env")
    with pytest.raises(
        MissingDependencyError, match=r"'test/Absent-v0' cannot be imported: No module named 'no_such"
    ):
        make("test/Absent-v0")


def test_an_environment_without_tasks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="'CartPole-v1' is not a text environment: it has no tasks, task_hash, spl"
    ):
        make("CartPole-v1")


def test_an_environment_registered_with_gymnasium_alone_can_be_made() -> None:
    gymnasium.register("test/Plain-v0", Corridor)
    assert isinstance(make("test/Plain-v0").unwrapped, Corridor)


def test_the_installed_entry_points_are_those_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [])
    load_plugins()
    assert asked == ["agentrl.envs"]


def test_a_plugin_without_a_distribution_is_named_by_its_value() -> None:
    entry: Any = SimpleNamespace(name="loose", value="plug_loose:register", dist=None)
    assert registry._origin(entry) == "plug-in 'loose' (plug_loose:register)"
