"""What a stranger meets who installs agentrl without the games' data, or misses an extra."""

import re
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import agentrl
from agentrl.config import read_yaml
from agentrl.errors import missing_extra

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [
    *(("build", line) for line in PROJECT["build-system"]["requires"]),
    *(("agentrl", line) for line in PROJECT["project"]["dependencies"]),
    *((extra, line) for extra, lines in EXTRAS.items() for line in lines),
]
REMEDY = "pip install --no-deps alfworld==0.4.2"


def pins() -> dict[str, set[Version]]:
    """Return the versions that the constraints files pin, by normalised name."""
    found: dict[str, set[Version]] = {}
    for path in ROOT.glob("constraints*.txt"):
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.M):
            found.setdefault(re.sub("[-_.]+", "-", name).lower(), set()).add(Version(version))
    return found


PINS = pins()


def test_nothing_tells_to_install_the_project_that_the_package_index_has_under_our_name() -> None:
    places = (
        "agentrl",
        "configs",
        "docs",
        "envs",
        "scripts",
        "tests",
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
    )
    named = set()
    for place in places:
        for path in [ROOT / place, *(ROOT / place).rglob("*")]:
            if path.suffix in (".py", ".md", ".yaml", ".j2", ".sbatch", "") and path.is_file():
                text = path.read_text()
                assert not re.search(r"pip install (-\S+ )*['\"]?agentrl\b|agentrl\\?\[[a-z]", text), path
                named |= set(re.findall(r'missing_extra\([^\n]*, "([a-z-]+)"\)', text))
    assert {"lora", "math", "ray", "reasoning-gym", "scienceworld", "webshop"} <= named <= {*EXTRAS}


def test_an_extra_is_installed_from_the_checkout() -> None:
    assert str(missing_extra("this needs Ray", "ray")) == (
        "this needs Ray: pip install -e '.[ray]' (in agentrl's checkout)"
    )


@pytest.mark.parametrize(("extra", "line"), REQUIREMENTS, ids=lambda value: value)
def test_every_requirement_has_a_lower_bound_that_the_pinned_version_meets(extra: str, line: str) -> None:
    requirement = Requirement(line)
    assert {clause.operator for clause in requirement.specifier} & {">=", "==", "~="}, line
    assert not {clause.operator for clause in requirement.specifier} & {"<", "<=", "!="}, line
    name = re.sub("[-_.]+", "-", requirement.name).lower()
    for pinned in PINS.get(name, ()):
        assert pinned in requirement.specifier, (line, pinned)


def test_the_version_is_written_once_and_cited() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "agentrl/__init__.py"
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == agentrl.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    names = [author["name"] for author in PROJECT["project"]["authors"]]
    assert [author["name"] for author in citation["authors"]] == names


def test_the_hosted_tests_run_on_every_python_that_is_named() -> None:
    workflow = read_yaml(ROOT / ".github" / "workflows" / "tests.yml")
    stem = "Programming Language :: Python :: 3."
    named = [line for line in PROJECT["project"]["classifiers"] if line.startswith(stem)]
    assert [f"{stem}{minor}" for minor in (11, 12, 13)] == named
    job = workflow["jobs"]["tests"]
    assert [f"{stem}{python.removeprefix('3.')}" for python in job["strategy"]["matrix"]["python"]] == named
    assert {"make check", "make test"} <= {step.get("run") for step in job["steps"]}


def test_the_changelog_begins_with_what_is_not_released() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plain_install_names_the_one_command_that_fetches_the_games(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True, cwd=tmp_path)
    agentrl = tmp_path / "venv" / "bin" / "agentrl"
    listed = subprocess.run([agentrl, "envs"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "agentrl/ALFWorld-v0" in listed.stdout
    (metadata,) = (tmp_path / "venv" / "lib").glob("*/site-packages/agentrl-*.dist-info")
    assert metadata.name == f"agentrl-{agentrl.__version__}.dist-info"
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    shipped = subprocess.run(
        [agentrl, "config", "quickstart.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert shipped.returncode == 0, shipped.stderr
    played = subprocess.run(
        [agentrl, "play", "agentrl/ALFWorld-v0", "--policy", "random"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert played.returncode == 2
    assert REMEDY in played.stderr
    assert "Traceback" not in played.stderr
