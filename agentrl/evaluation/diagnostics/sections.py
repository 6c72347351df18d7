"""The diagnostics that a run's folder holds, as sections of its report."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agentrl.errors import CheckpointError
from agentrl.evaluation.diagnostics.drawing import draw_expert_entropy, draw_leash, draw_template_collapse
from agentrl.evaluation.diagnostics.findings import FOLDER, Findings, Numbers
from agentrl.evaluation.diagnostics.tables import (
    expert_entropy_findings,
    leash_findings,
    template_collapse_findings,
)
from agentrl.files import read_json

_REMEDY = "remove it, or measure it again"
_KINDS: Mapping[str, tuple[Callable[[Numbers], Findings], Callable[[Numbers], str]]] = {
    "leash/leash.json": (leash_findings, draw_leash),
    f"{FOLDER}/template_collapse.json": (template_collapse_findings, draw_template_collapse),
    f"{FOLDER}/expert_entropy.json": (expert_entropy_findings, draw_expert_entropy),
}


def diagnostic_sections(run_folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield what the report shows of each diagnostic: its `findings` and its `figure`.

    Raises:
        CheckpointError: If a file is damaged.
    """
    for name, (describe, draw) in _KINDS.items():
        if (path := run_folder / name).is_file():
            numbers = read_json(path, dict[str, Any], _REMEDY)
            try:
                section = {"findings": describe(numbers), "figure": draw(numbers)}
            except Exception as error:  # whatever a file of another shape leads to
                raise CheckpointError(
                    f"{path}: damaged ({type(error).__name__}: {error}); {_REMEDY}"
                ) from error
            yield section
