"""Every command, snippet and link of the documentation works; generated pages say what the code says."""

import importlib.util
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import yaml
from chat_models import chat_model
from chat_servers import chat_server
from shell import ROOT, SMALL, TINY, commands, run_all, run_here, smaller, working_tree

import agentrl
from agentrl.algorithms.catalogue import describe, list_methods
from agentrl.run.settings import config_tree

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
SHELL_PAGES = [name for name in PAGES if commands((DOCS / name).read_text())]
QUOTING = "tutorials/minimal-grpo.md"  # its Python is quoted from a script
PYTHON_PAGES = [name for name in PAGES if name != QUOTING and "```python" in (DOCS / name).read_text()]
EXTRAS = {
    "environments/scienceworld.md": "scienceworld",
    "environments/webshop.md": "nltk",
    "environments/reasoning-gym.md": "reasoning_gym",
    "prompts.md": "nltk",
    "results.md": "scienceworld",
    "tutorials/endpoint.md": "openai",
}
ADDRESS = "http://127.0.0.1:8000/v1"


def python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a tiny run, in which we are."""
    folder = working_tree(tmp_path / "agentrl")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = agentrl.load_config(
        "configs/quickstart.yaml", *TINY, f"run.folder={folder}", "run.name=a-tiny-run"
    )
    return agentrl.train(config, quiet=True).folder


def made_small(line: str, model: Path, server: str) -> str:
    """A command of a page with names filled in, and on few and small tasks."""
    line = line.replace("=FOLDER", f"={model}").replace("--policy FOLDER", f"--policy {model}")
    line = line.replace("--policy smollm2", f"--policy {model}").replace(ADDRESS, server)
    line = line.replace(
        "--suite text_games", "--env agentrl/ALFWorld-v0 --env agentrl/Reasoning-v0 --tasks 2"
    )
    line = re.sub(r"--tasks \d+", "--tasks 2", line)
    if line.startswith("agentrl evaluate ") and "--env" in line and "--tasks" not in line:
        line += " --tasks 2"
    if line.startswith("agentrl train configs/"):
        line += " warm_start.batch_size=12"
    if "configs/smollm2_alfworld.yaml" in line and not line.startswith("agentrl evaluate"):
        line += f" policy.path={model} trainer.threads=1"
    if line.startswith("python scripts/minimal_grpo.py"):
        return f"{line} 2"
    if line.startswith("python scripts/bench_"):
        return f"{line} --help"
    return smaller(line)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("page", SHELL_PAGES)
def test_the_commands_of_a_page_run_as_they_are_written(
    page: str, tree: Path, model: Path, trained: Path
) -> None:
    if page in EXTRAS:
        pytest.importorskip(EXTRAS[page])
    (tree / "runs").mkdir()
    (tree / "runs" / trained.name).symlink_to(trained)
    for text in python_of(page) if page != QUOTING else ():
        if named := re.match(r"# (\w+\.py)\n", text):
            (tree / named[1]).write_text(text)
    with chat_server(lambda call: call.say("go to shelf 1")) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        for line in commands((DOCS / page).read_text()):
            if line.startswith("agentrl compare"):  # of runs A and B: tests/evaluation/test_compare.py
                continue
            tried = made_small(line, model, url).replace("$(ls runs | head -n 1)", trained.name)
            tried = re.sub(r"train-000100\b|(?<=--checkpoint )100\b", "train-000001", tried)  # what is kept
            if tried.startswith("agentrl "):
                run_here(tried)
            else:
                printed = run_all(["source .venv/bin/activate", tried], tree)
                assert all(
                    option in printed for option in re.findall(r" (--[a-z-]+)", line) if "--help" in tried
                )


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_of_a_page_runs(
    page: str, tree: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = agentrl.load_config

    def small(path: str, *overrides: str) -> Any:
        return load(path, *overrides, *SMALL)

    monkeypatch.setattr(agentrl, "load_config", small, raising=False)
    (tree / "runs").mkdir()
    (tree / "runs" / "look").symlink_to(trained)
    scope: dict[str, Any] = {}
    for text in python_of(page):
        if not re.match(r"# \w+\.py\n", text):  # the commands of the page run the files
            exec(text.replace("tasks=100", "tasks=3"), scope)


def test_the_page_on_minimal_grpo_quotes_the_script() -> None:
    script = (ROOT / "scripts" / "minimal_grpo.py").read_text()
    quoted = python_of(QUOTING)
    assert len(quoted) > 5
    for text in quoted:
        assert text in script
    told = "".join(quoted)
    body = script[script.index("class Lamp") : script.index("    return rates")]
    missing = [line for line in body.splitlines() if line.strip() and line not in told]
    assert all(line.lstrip().startswith(("def main", "rates = []", "for step in")) for line in missing), (
        missing
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_yaml_of_a_page_is_yaml(page: str) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.S):
        yaml.safe_load(text)


def test_every_configuration_key_that_a_page_names_exists() -> None:
    tree = config_tree(agentrl.load_config(None))
    rooms = "policy|warm_start|rollout|engine|learner|trainer|evaluation|run"
    unknown = []
    for path in [ROOT / "README.md", *(DOCS / page for page in PAGES)]:
        quoted = " ".join(re.findall(r"`([^`\n]+)`", path.read_text()))
        for key in re.findall(rf"(?<![\w./])((?:{rooms})\.[a-z_.]+\b)(?!/)", quoted):
            if key == "policy.model":  # of a fingerprint
                continue
            block: Any = tree
            for part in key.split("."):
                if block is not None and part not in ("py", "md", "yaml"):
                    block = block.get(part, unknown) if isinstance(block, dict) else None
                if block is unknown:
                    unknown.append(f"{path.name}: {key}")
                    break
                if part == "template_arguments":
                    break
    assert not unknown


def links(text: str) -> list[str]:
    """The targets of a page's links and images, but for those in code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [target.split()[0] for target in re.findall(r"\]\(([^)]+)\)", text)]


def test_every_link_between_plain_markdown_files_leads_somewhere(site_pages: ModuleType) -> None:
    generated = {*site_pages.generated_pages()} | {
        f"studies/{path.parent.name}.svg" for path in site_pages.studies()
    }
    sources = [DOCS / page for page in PAGES] + [ROOT / "README.md", *site_pages.ROOT_PAGES]
    broken = []
    for source in sources:
        for link in links(source.read_text()):
            target = urldefrag(unquote(link)).url
            if urlparse(link).scheme or not target:
                continue
            path = Path(os.path.normpath(source.parent / target))
            below = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else None
            if not path.exists() and below not in generated:
                broken.append(f"{source.relative_to(ROOT)}: {link}")
    assert not broken


class _Page(HTMLParser):
    """What a built page loads and links to, and the anchors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        self.anchors |= {named[key] for key in ("id", "name") if key in named}
        if tag in ("script", "img", "iframe", "source") and "src" in named:
            self.loads.append(named["src"])
        if tag == "link" and named.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(named["href"])
        if tag == "a" and "href" in named:
            self.links.append(named["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, _Page]]:
    """The built site, with every page as it is read."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    pages = {}
    for path in folder.rglob("*.html"):
        pages[path] = _Page()
        pages[path].feed(path.read_text())
    return folder, pages


@pytest.mark.timeout(600)
def test_the_site_is_built_strictly_and_loads_nothing_from_the_network(
    site: tuple[Path, dict[Path, _Page]],
) -> None:
    folder, pages = site
    assert folder / "methods" / "epo.html" in pages
    assert len(pages) > 80
    for path, page in pages.items():
        assert not [each for each in page.loads if urlparse(each).netloc], path
    for path in folder.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", path.read_text()), path


def test_every_link_of_the_site_leads_to_a_page_and_a_place_in_it(
    site: tuple[Path, dict[Path, _Page]],
) -> None:
    folder, pages = site
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if urlparse(link).scheme or path.name == "404.html":
                continue
            goal = path if target in ("", ".") else Path(os.path.normpath(path.parent / target))
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.exists() or (anchor and goal in pages and anchor not in pages[goal].anchors):
                broken.append(f"{path.relative_to(folder)}: {link}")
    assert not broken


def test_a_new_user_finds_three_answers_within_two_clicks(site: tuple[Path, dict[Path, _Page]]) -> None:
    folder, pages = site
    home = folder / "index.html"
    first = {urldefrag(link).url for link in pages[home].links}
    for answer in ("tutorials/real-model.html", "tutorials/your-environment.html", "methods/epo.html"):
        assert answer in first
    words = home.read_text()
    assert "Can it train my Qwen on ALFWorld?" in words
    assert "How do I add my environment?" in words
    assert "Does EPO help, and how do you know?" in words


def test_every_method_has_a_page_with_what_its_source_says(site_pages: ModuleType) -> None:
    pages = site_pages.generated_pages()
    for method in list_methods():
        page = pages[f"methods/{method.name}.md"]
        known = describe(method.name)
        assert f"| kind | {known['kind'] or 'not said'} |" in page
        assert f"| checked against | {known['confidence'] or 'not said'} |" in page
        told, arguments, source = site_pages.split_docstring(known["text"])
        formulas = re.findall(r"(?m)^    (?! )(.+=.+)$", told)
        assert all(line in page for line in formulas if " | " not in line), method.name
        assert all(f"| `algorithm.{key}` |" in page for key in arguments)
        assert set(arguments) <= set(known["defaults"]), method.name
        assert source is None or "| source | not said |" not in page
        assert f"({method.name}.md)" in pages["methods/index.md"]
        assert f"methods/{method.name}.md" in pages["papers.md"] or source is None


@pytest.mark.parametrize("name", [method.name for method in list_methods()])
def test_the_command_of_a_methods_page_is_accepted(name: str) -> None:
    config = agentrl.load_config(str(ROOT / "configs" / "quickstart.yaml"), f"algorithm.name={name}")
    assert config.algorithm.name == name


@pytest.mark.usefixtures("examples")
def test_a_method_of_a_third_party_gets_a_page(site_pages: ModuleType) -> None:
    page = site_pages.method_page(describe("example_rloo"))
    assert page.startswith("# example_rloo\n\nREINFORCE with the mean return of the other episodes")
    assert "| `algorithm.scale` | `1.0` | Factor of the advantage. |" in page
    assert "No study of this repository has measured it." in page


def test_a_measured_method_shows_its_row_of_the_study(site_pages: ModuleType) -> None:
    table = (ROOT / "configs" / "studies" / "quickstart_methods" / "table.md").read_text()
    (row,) = re.findall(r"(?m)^\| gigpo, step_weight 1.0, own \| (\S+)", table.split("\n\n")[1])
    (shown,) = [line for line in site_pages.measured("gigpo") if line.startswith("| gigpo |")]
    assert row in shown


def test_a_docstring_becomes_markdown(site_pages: ModuleType) -> None:
    text = (
        "Say so.\n\n    a = b * c\n\n    d | e\n    1 | x*y\n\nMore:\n- one <b>\n  two\n\n"
        "Args:\n    k: What\n        it is.\n\nSource: X 2025, arXiv:2501.00001."
    )
    told, arguments, source = site_pages.split_docstring(text)
    assert arguments == {"k": "What it is."}
    assert source == "X 2025, arXiv:2501.00001."
    assert site_pages.as_markdown(told) == (
        "Say so.\n\n```text\na = b * c\n```\n\n| d | e |\n|---|---|\n| 1 | x\\*y |\n\n"
        "More:\n\n- one &lt;b>\n  two"
    )


def test_the_glossary_has_each_word_once_in_one_sentence() -> None:
    text = (DOCS / "concepts.md").read_text().partition("## Glossary")[2]
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \|$", text)[1:]
    words = [word for word, _ in rows]
    assert words == sorted(set(words))
    assert {"episode", "turn", "trajectory", "group", "panel", "outcome", "placement"} <= set(words)
    assert all(meaning.endswith(".") and meaning.count(". ") == 0 for _, meaning in rows)


def test_the_readme_is_short_and_shows_a_small_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    (picture,) = re.findall(r"!\[[^]]+\]\((docs/images/[^)]+)\)", text)
    assert 5_000 < (ROOT / picture).stat().st_size < 200_000


def test_the_pages_use_no_em_dash() -> None:
    for path in [*(DOCS / page for page in PAGES), ROOT / "README.md"]:
        assert "\N{EM DASH}" not in path.read_text(), path
