"""`agentrl check-env` checks one environment, several or all, and its exit code can be trusted in CI."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from typer.testing import CliRunner

import agentrl.env.registry
from agentrl.cli import app
from agentrl.env import MultiTurnEnv, register
from agentrl.errors import MissingDependencyError


class Knock(MultiTurnEnv):
    """Knock as often as told."""

    def __init__(self, knocks: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.knocks = knocks

    def problems(self, split: str) -> list[int]:
        return [self.knocks]

    def start(self, problem: int) -> str:
        self.left = problem
        return f"knock {problem} times"

    def act(self, action: str) -> tuple[str, float, bool]:
        self.left -= action == "knock"
        return "knock, knock", float(not self.left), not self.left


class Deaf(Knock):
    def act(self, action: str) -> tuple[str, float, bool]:
        raise RuntimeError("\x1b[31mout of doors")


class Demanding(Knock):
    def __init__(self, door: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Uninstalled(Knock):
    def __init__(self, **kwargs: Any) -> None:
        raise MissingDependencyError("pip install -e '.[doors]'")


class UninstalledUntilReset(Knock):
    def start(self, problem: int) -> str:
        raise MissingDependencyError("no data: run fetch-doors")


KINDS = {
    "Knock": Knock,
    "Deaf": Deaf,
    "Demanding": Demanding,
    "Uninstalled": Uninstalled,
    "UninstalledUntilReset": UninstalledUntilReset,
    "Absent": "agentrl_tests_doors.env:Doors",
    "NeedsAbsent": "needs_absent:Doors",
    "Misspelt": "misspelt:Doors",
}


def id_of(kind: str) -> str:
    return f"check-env-tests/{kind}-v0"


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_absent.py").write_text("import agentrl_tests_absent_package")
    (tmp_path / "misspelt.py").write_text("from agentrl.env import MultiTurnEnw")
    for kind, entry_point in KINDS.items():
        register(id_of(kind), entry_point)
    yield
    for kind in KINDS:
        del gymnasium.registry[id_of(kind)]


@pytest.fixture
def all_are(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes some of them all there are."""

    def only(*kinds: str, broken: Mapping[str, str] | None = None) -> None:
        monkeypatch.setattr(agentrl.env.registry, "env_ids", lambda: [id_of(kind) for kind in kinds])
        monkeypatch.setattr(agentrl.env.registry, "broken_plugins", lambda: broken or {})

    return only


def check(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check-env", *arguments], prog_name="agentrl")


def rows(output: str) -> list[str]:
    return [" ".join(line.split()) for line in output.splitlines()]


def test_the_table_fits_in_80_columns_without_a_terminal() -> None:
    result = check(id_of("Knock"))
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout
    lines = rows(result.stdout)
    assert lines[:5] == [
        "check-env-tests/Knock-v0 keeps the contract: 19 passed, 3 skipped",
        "determinism episode declared, episode proven",
        "thread safe not declared",
        "declares snapshot",
        "tasks 1 train, 1 test",
    ]
    assert "seeds passed 2 episodes again on a new environment: the same" in lines
    assert "expert skipped not declared" in lines


def test_arguments_reach_the_environment_and_one_check_has_no_summary() -> None:
    result = check(id_of("Knock"), "knocks=1")
    assert result.exit_code == 0
    assert "answers passed 2 episodes, 40 steps: tuples of 2 and 5, finite" in rows(result.stdout)
    assert sum("keeps the contract" in line for line in result.stdout.splitlines()) == 1
    refused = check(id_of("Knock"), "knocks=1", "max_steps=0")
    assert refused.exit_code == 2
    assert "max_steps: 0, wanted" in refused.stderr


def test_a_broken_contract_is_exit_code_1_and_cannot_steer_the_terminal() -> None:
    result = check(id_of("Deaf"))
    assert result.exit_code == 1
    lines = rows(result.stdout)
    assert lines[0] == "check-env-tests/Deaf-v0 breaks the contract: 2 passed, 1 failed, 19 skipped"
    assert "answers failed raised RuntimeError: �[31mout of doors" in lines
    assert any(line.startswith("19 others skipped not checked: no episode could be") for line in lines)


def test_several_are_checked_and_summed_up() -> None:
    result = check(id_of("Knock"), id_of("Deaf"), "knocks=3")
    assert result.exit_code == 1
    knock, deaf = result.stdout.splitlines()[-2:]
    assert knock.startswith("check-env-tests/Knock-v0 keeps the contract: 19 passed, 3 skipped (0.")
    assert deaf.startswith("check-env-tests/Deaf-v0 breaks the contract: 2 passed, 1 failed")


def test_all_skips_what_lacks_an_extra_and_passes(all_are: Any) -> None:
    all_are("Knock", "Uninstalled", "UninstalledUntilReset", "NeedsAbsent")
    result = check("--all")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-3:] == [
        "check-env-tests/Uninstalled-v0 skipped: pip install -e '.[doors]'",
        "check-env-tests/UninstalledUntilReset-v0 skipped: no data: run fetch-doors",
        "check-env-tests/NeedsAbsent-v0 skipped: environment 'check-env-tests/NeedsAbsent-v0' cannot be "
        "imported: No module named 'agentrl_tests_absent_package'",
    ]


@pytest.mark.parametrize("kind", ["Deaf", "Demanding", "Absent", "Misspelt"])
def test_all_fails_for_one_that_is_broken_and_looks_at_the_others(kind: str, all_are: Any) -> None:
    all_are(kind, "Knock")
    result = check("--all")
    assert result.exit_code == 1
    broken, knock = result.stdout.splitlines()[-2:]
    assert broken.startswith(
        f"check-env-tests/{kind}-v0 {'breaks' if kind == 'Deaf' else 'cannot be made: '}"
    )
    assert knock.startswith("check-env-tests/Knock-v0 keeps the contract")


def test_all_fails_for_a_broken_plug_in(all_are: Any) -> None:
    all_are("Knock", broken={"plug-in 'x'": "ImportError: y"})
    result = check("--all")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "plug-in 'x' is broken: ImportError: y"


@pytest.mark.parametrize("kind", ["Uninstalled", "NeedsAbsent"])
def test_an_environment_that_is_asked_for_by_name_has_to_be_installed(kind: str) -> None:
    result = check(id_of("Knock"), id_of(kind))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["knocks=2"], ["--all", "some/Env-v0"], ["--all", "knocks=2"]])
def test_either_ids_or_all(arguments: list[str]) -> None:
    result = check(*arguments)
    assert result.exit_code == 2
    assert "wants either ids, with KEY=VALUE for their arguments, or --all alone" in result.stderr


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys\nfrom agentrl.cli import main\n"
        "try: main(['check-env', 'agentrl/Reasoning-v0'])\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
