"""Self-contained HTML pages in one style, light and dark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agentrl.terminal import printable


def render_page(name: str, content: Mapping[str, Any]) -> str:
    """Return the page of the template `NAME.html.j2`, with texts escaped and without control characters."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
    )
    return templates.get_template(f"{name}.html.j2").render(content)
