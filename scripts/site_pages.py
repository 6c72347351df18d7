"""Write the pages of the site that follow from the code: those of the methods, and the index of papers.

mkdocs calls `on_config` and `on_files` (see mkdocs.yml), so nothing of this is committed, and an installed
method of a third party gets its page like a built-in one.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from agentrl.algorithms.catalogue import Method, describe, list_methods
from agentrl.config import to_yaml

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "configs" / "studies"
ARXIV = re.compile(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b")
METHODS = "methods/"
ROOT_PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")  # where people look for them: not below docs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the methods in the navigation, by kind, and the studies."""
    by_kind: dict[str, list[dict[str, str]]] = defaultdict(list)
    for method in methods():
        by_kind[_title(method.kind)].append({method.name: f"{METHODS}{method.name}.md"})
    own = [f"{METHODS}index.md", *({kind: pages} for kind, pages in by_kind.items())]
    for item in config.nav or ():
        if item.get("Methods") == METHODS:
            item["Methods"] = own
        if "Results" in item:
            item["Results"] += [{f"Study {path.parent.name}": _study_page(path)} for path in studies()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    for path in studies():
        figure = path.with_name("study.svg")
        if figure.is_file():
            files.append(File.generated(config, f"studies/{path.parent.name}.svg", abs_src_path=str(figure)))
    return files


def generated_pages() -> dict[str, str]:
    """Return the Markdown of every page that follows from the code, by its path below `docs`."""
    known = [describe(method.name) for method in methods()]
    pages = {f"{METHODS}index.md": methods_index(), "papers.md": papers_page(known)}
    pages |= {f"{METHODS}{each['name']}.md": method_page(each) for each in known}
    pages |= {_study_page(path): study_page(path) for path in studies()}
    return pages | {f"{path.stem.lower()}.md": root_page(path) for path in ROOT_PAGES}


def studies() -> list[Path]:
    """Return the results of the studies of this checkout."""
    return sorted(STUDIES.glob("*/results.json"))


def study_page(results: Path) -> str:
    """Return the page of a study: its tables, its figure and the command."""
    name = results.parent.name
    beside = results.parent.with_suffix(".yaml")
    file = beside if beside.exists() else results.with_name("study.yaml")
    command = f"python scripts/study.py {file.relative_to(ROOT)} --jobs 2"
    table = results.with_name("table.md").read_text(encoding="utf-8").replace("study.svg", f"{name}.svg")
    lines = [f"# Study {name}", "", _fenced(command, "bash"), "", table.rstrip()]
    return "\n".join(lines) + "\n"


def root_page(path: Path) -> str:
    """Return a page of the root folder, whose links into `docs` are then links between neighbours."""
    return path.read_text(encoding="utf-8").replace("](docs/", "](").replace("](README.md)", "](index.md)")


def _study_page(results: Path) -> str:
    return f"studies/{results.parent.name}.md"


@cache
def methods() -> tuple[Method, ...]:
    """Return all installed methods, in the order of the kinds, then of their names."""
    return tuple(list_methods())


def methods_index() -> str:
    """Return the page that lists the methods."""
    lines = [
        "# Methods",
        "",
        f"{len(methods())} methods, by what they mainly change. Each page is written from the source: "
        "the formula, the defaults, where the paper and the released code differ, what it needs and refuses, "
        "and the row in a study, where one measured it. Methods combine: see [your "
        "method](../tutorials/your-method.md).",
        "",
        "*Checked against* says what the formula was compared with.",
    ]
    kind: str | None = ""
    for method in methods():
        if method.kind != kind:
            kind = method.kind
            lines += ["", f"## {_title(kind)}", "", "| method | what it does | source | checked against |"]
            lines += ["|---|---|---|---|"]
        source = _linked(method.source or "not said")
        checked = method.confidence or "not said"
        lines.append(
            f"| [`{method.name}`]({method.name}.md) | {_cell(method.summary)} | {source} | {checked} |"
        )
    return "\n".join(lines) + "\n"


def method_page(known: Mapping[str, Any]) -> str:
    """Return the page of a method.

    Args:
        known: What `catalogue.describe` says of it.
    """
    name = known["name"]
    told, arguments, source = split_docstring(known["text"])
    summary, _, body = told.partition("\n")
    rows = {
        "kind": known["kind"] or "not said",
        "checked against": known["confidence"] or "not said",
        "source": _linked(source or "not said"),
        "needs": ", ".join(f"`{each}`" for each in known["requires"]) or "nothing beyond its base",
    }
    lines = [f"# {name}", "", _text(summary), "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", "## What it computes", "", as_markdown(body)]
    if arguments:
        lines += ["", "## Settings", "", "| key | default | meaning |", "|---|---|---|"]
        for key, meaning in arguments.items():
            default = known["defaults"].get(key)
            shown = default["name"] if isinstance(default, Mapping) else json.dumps(default)
            lines.append(f"| `algorithm.{key}` | `{shown}` | {_cell(meaning)} |")
    lines += ["", "## What it changes", ""]
    what = "its base" if "base" in known["defaults"] else "plain GRPO"
    lines += [f"Parts of the [algorithm record](../api/algorithms.md) that differ from {what}:", ""]
    lines += [f"- {_text(each)}" for each in known["changes"]] or ["- none"]
    lines += ["", "## What it refuses", ""]
    lines += [f"- {_text(each)}" for each in known["refuses"]] or ["No combination is refused by name."]
    lines += ["", "## Measured", "", *measured(name)]
    lines += ["", "## Use it", "", "```bash", f"agentrl train configs/quickstart.yaml algorithm.name={name}"]
    lines += [f"agentrl algorithms {name}    # this page, in the terminal", "```"]
    for preset, values in known["presets"].items():
        if values:
            lines += ["", f"`algorithm.preset={preset}` sets", "", _fenced(to_yaml(dict(values)), "yaml")]
    lines += ["", "All defaults:", "", _fenced(to_yaml({"algorithm": known["defaults"]}), "yaml")]
    return "\n".join(lines) + "\n"


def measured(name: str) -> list[str]:
    """Return the lines on a method's results in the studies of this checkout."""
    lines = []
    for path in studies():
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["study"]["methods"]
        rows = [
            row for row in settings if row in found["methods"] and name in _names(settings[row]["algorithm"])
        ]
        if not rows:
            continue
        study = path.parent.name
        seeds = ", ".join(map(str, found["study"]["seeds"]))
        lines += [
            f"In the study [{study}](../results.md) (seeds {seeds}; differences are paired, to "
            f"`{found['baseline']}`, in points; 95 % intervals over the games):",
            "",
            "| row | settings | greedy % | difference | sampled % | difference |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [
                cell for way in ("greedy", "sampled") for cell in _scores(found["methods"][row].get(way))
            ]
            given = json.dumps(settings[row]["algorithm"]).replace('"', "")
            lines.append(f"| {row} | `{given}` | {' | '.join(cells)} |")
        lines.append("")
    return lines or ["No study of this repository has measured it."]


def papers_page(known: list[dict[str, Any]]) -> str:
    """Return the index of the papers of all methods."""
    configs = {path.stem: _configured(path) for path in sorted((ROOT / "configs").glob("*.yaml"))}
    papers: dict[str, tuple[str, list[str]]] = {}
    for each in known:
        source = split_docstring(each["text"])[2]
        for part in filter(None, map(str.strip, (source or "").rstrip(".").split(";"))):
            number = ARXIV.search(part)
            papers.setdefault(number[1] if number else part, (part, []))[1].append(each["name"])
    lines = [
        "# Paper index",
        "",
        "The papers and code that the methods follow, and where to find each here. Any configuration takes "
        "any method: `algorithm.name=NAME`. The last column names the configurations and studies with it.",
        "",
        "| source | method | used in |",
        "|---|---|---|",
    ]
    for key in sorted(papers, key=lambda key: (not ARXIV.fullmatch(key), key)):
        part, names = papers[key]
        using = [f"configs/{stem}.yaml" for stem, used in configs.items() if used & {*names}]
        using += [f"configs/studies/{stem}.yaml" for stem, used in _studied().items() if used & {*names}]
        linked = ", ".join(f"[`{name}`]({METHODS}{name}.md)" for name in names)
        lines.append(f"| {_linked(part)} | {linked} | {', '.join(f'`{each}`' for each in using)} |")
    return "\n".join(lines) + "\n"


def split_docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """Split a docstring into its text, its arguments with their meanings, and its source, without a mark."""
    told, _, source = text.partition("\nSource:")
    body, _, listed = told.partition("\nArgs:\n")
    listed, *_ = re.split(r"\n(?=\S)", listed)
    arguments: dict[str, str] = {}
    for line in listed.splitlines():
        if begun := re.match(r"    (\w+): (.*)", line):
            last, arguments[begun[1]] = begun[1], begun[2]
        elif line.strip():
            arguments[last] += f" {line.strip()}"
    return body.rstrip(), arguments, " ".join(source.split()) or None


def as_markdown(text: str) -> str:
    """Return the text of a docstring as Markdown: indented tables as tables, indented formulas as code."""
    return "\n\n".join(_block(part) for part in _parts(text.strip("\n")) if part)


def _parts(text: str) -> Iterator[list[str]]:
    """Yield runs of lines that are all text, all items of a list or all indented, without blank lines."""
    part: list[str] = []
    before = ""
    for line in text.splitlines():
        if not line.strip():
            now = ""
        elif line.startswith("- "):
            now = "list"
        elif line.startswith("    ") and before in ("", "code"):
            now = "code"
        else:
            now = "list" if line.startswith("  ") and before == "list" else "text"
        if now != before and part:
            yield part
            part = []
        if now:
            part.append(line)
        before = now
    yield part


def _block(lines: list[str]) -> str:
    if not lines[0].startswith("    "):
        return "\n".join(map(_text, lines))
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    if len(lines) > 1 and len(cells[0]) > 1 and all(len(row) == len(cells[0]) for row in cells):
        shown = ["| " + " | ".join(map(_text, row)) + " |" for row in cells]
        return "\n".join([shown[0], "|" + "---|" * len(cells[0]), *shown[1:]])
    return _fenced("\n".join(line[4:] for line in lines), "text")


def _scores(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return ["not run", ""]
    difference = found.get("difference")
    value, (low, high) = 100 * found["value"], (100 * each for each in found["interval"])
    cells = [f"{value:.1f} [{low:.0f}, {high:.0f}]", "baseline"]
    if difference:
        value, (low, high) = 100 * difference["value"], (100 * each for each in difference["interval"])
        cells[1] = f"{value:+.1f} [{low:+.0f}, {high:+.0f}]"
    return cells


def _configured(path: Path) -> set[str]:
    return _names(yaml.safe_load(path.read_text(encoding="utf-8")).get("algorithm") or {})


@cache
def _studied() -> dict[str, set[str]]:
    found = {}
    for path in sorted(STUDIES.glob("*.yaml")):
        rows = yaml.safe_load(path.read_text(encoding="utf-8")).get("methods") or {}
        blocks = [row.get("algorithm") if isinstance(row, Mapping) else row for row in rows.values()]
        found[path.stem] = set().union(*map(_names, blocks)) if blocks else set()
    return found


def _names(algorithm: Any) -> set[str]:
    """Return the methods that a block `algorithm` names, its bases and the parts of a stack included."""
    if isinstance(algorithm, str):
        return {algorithm}
    if isinstance(algorithm, list):
        return set().union(*map(_names, algorithm)) if algorithm else set()
    if not isinstance(algorithm, Mapping):
        return set()
    return set().union(*(_names(algorithm[key]) for key in ("name", "base", "compose") if key in algorithm))


def _title(kind: str | None) -> str:
    return (kind or "other").capitalize()


def _linked(text: str) -> str:
    return ARXIV.sub(lambda found: f"[arXiv:{found[1]}](https://arxiv.org/abs/{found[1]})", _cell(text))


def _text(text: str) -> str:
    """Return text in which Markdown reads no HTML and no emphasis, but for what stands in backticks."""
    quoted = re.split(r"(`[^`]*`)", text)
    return "".join(each if each.startswith("`") else _unmarked(each) for each in quoted)


def _unmarked(text: str) -> str:
    return re.sub(r"\*(?=\S)|(?<=\S)\*", r"\\*", text).replace("<", "&lt;")


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
